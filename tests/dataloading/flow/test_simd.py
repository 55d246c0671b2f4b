from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numba
import numpy as np
import pytest

from dataloading.flow.median import median, median_scratch_size
from dataloading.flow.padded_images import aligned_zeros, interior, padded_size
from dataloading.flow.simd import broadcast, element_indices, kernel, load, sqrt, store
from dataloading.flow.tvl1_warp import fill_sources, linearise, source_size


@kernel
def distances(image: np.ndarray, out: np.ndarray) -> None:
    for start in range(0, len(image), 16):
        value = load(image, start) - element_indices()
        store(out, start, sqrt(value * value) / broadcast(np.float32(2)))


def test_a_vector_computes_the_same_as_numpy() -> None:
    image = np.random.default_rng(0).normal(size=48).astype(np.float32)
    out = np.empty_like(image)
    distances(image, out)
    np.testing.assert_array_equal(out, np.abs(image - np.tile(np.arange(16, dtype=np.float32), 3)) / 2)


def test_a_kernel_works_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def without_a_cache(**options: Any) -> Callable[..., Any]:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_a_cache)
    assert kernel(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize("size", [(37, 53), (16, 16), (5, 64), (3, 1)])
def test_the_median_equals_opencvs(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).normal(size=size).astype(np.float32)
    images = aligned_zeros(2, padded_size(*size))
    interior(images, *size)[0] = picture
    median(images[0], images[1], aligned_zeros(1, median_scratch_size(size[1]))[0], *size)
    np.testing.assert_array_equal(interior(images, *size)[1], cv2.medianBlur(picture, 5))


def test_the_warp_is_opencvs_cubic_even_far_outside_the_frame() -> None:
    height, width = 24, 137
    generator = np.random.default_rng(0)
    earlier, later = generator.random((2, height, width), dtype=np.float32) * 255
    images = aligned_zeros(7, padded_size(height, width))
    memory = aligned_zeros(5, source_size(height, width))
    memory[[0, 4]] = np.nan  # must not be read: even a weight of 0 leaves it NaN
    sources = memory[1:4]
    pixels = interior(images, height, width)
    pixels[:2] = generator.normal(scale=5, size=(2, height, width))
    pixels[:2, 3, 4] = 1e4, -1e4
    pixels[1, 7, 96:112], pixels[1, 9, 96:112] = 1e4, -1e4
    pixels[2] = earlier
    fill_sources(later, sources, height, width)
    linearise(images[:2], images[2], sources, images[3:], height, width, 0.5)

    down, across = np.mgrid[:height, :width].astype(np.float32)
    places = across + pixels[0], down + pixels[1]
    padded = cv2.copyMakeBorder(later, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    gradients = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    frame, *slopes = (cv2.remap(each, *places, cv2.INTER_CUBIC) for each in (later, *gradients))
    length = np.hypot(*slopes)
    np.testing.assert_allclose(pixels[3] * length, slopes[0], atol=1e-3)
    np.testing.assert_allclose(pixels[4] * length, slopes[1], atol=1e-3)
    np.testing.assert_allclose(pixels[6], length / 2, rtol=1e-5, atol=1e-3)
    residual = frame - slopes[0] * pixels[0] - slopes[1] * pixels[1] - earlier
    np.testing.assert_allclose((pixels[5] * length)[length > 0.001], residual[length > 0.001], atol=0.01)

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataloading.loader.augment import (
    Augmentation,
    AugmentConfig,
    augment,
    augment_by_opencv,
    augment_by_torch,
    draw_augmentation,
)
from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError

Apply = Callable[[torch.Tensor, Augmentation], torch.Tensor]
NOTHING = Augmentation(jitter=(), grey=False, blur_sigma=0.0, mirror=False)


def clip(seed: int = 0, size: int = 24) -> torch.Tensor:
    """Random pixels, uint8 (4, size, size + 8, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, size, size + 8, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=[augment_by_opencv, augment_by_torch])
def apply(request: pytest.FixtureRequest) -> Apply:
    """Each implementation: OpenCV's for CPUs and torch's for GPUs."""

    def changed(pixels: torch.Tensor, drawn: Augmentation) -> torch.Tensor:
        request.param(pixels, drawn)
        return pixels

    return changed


def jittered(apply: Apply, name: str, value: float) -> torch.Tensor:
    return apply(clip(), replace(NOTHING, jitter=((name, value),)))


def grey_of(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.uint8
    assert (found.double() - exact.clamp(0, 255)).abs().max() <= 0.51


def test_an_empty_draw_changes_nothing(apply: Apply) -> None:
    assert torch.equal(apply(clip(), NOTHING), clip())


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_scales_pixels(apply: Apply, factor: float) -> None:
    assert_rounded(jittered(apply, "brightness", factor), clip().double() * factor)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_contrast_blends_with_the_mean_grey_of_the_frame(apply: Apply, factor: float) -> None:
    mean = grey_of(clip()).mean(dim=(1, 2))[:, None, None, None]
    assert_rounded(jittered(apply, "contrast", factor), factor * clip().double() + (1 - factor) * mean)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_saturation_blends_with_the_grey_of_the_pixel(apply: Apply, factor: float) -> None:
    grey = grey_of(clip())[..., None]
    assert_rounded(jittered(apply, "saturation", factor), factor * clip().double() + (1 - factor) * grey)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
def test_hue_shifts_the_hue_of_hsv(apply: Apply, shift: float) -> None:
    pixels = clip()
    pixels[0, 0, :4] = torch.tensor([[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 255]])
    expected = []
    for pixel in (pixels.double() / 255).reshape(-1, 3).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))

    shifted = apply(pixels, replace(NOTHING, jitter=(("hue", shift),)))

    assert_rounded(shifted, torch.tensor(expected, dtype=torch.float64).view(pixels.shape) * 255)


def test_jitter_is_applied_in_the_order_drawn(apply: Apply) -> None:
    steps = (("brightness", 1.4), ("contrast", 0.6))

    one, other = (apply(clip(), replace(NOTHING, jitter=order)) for order in (steps, steps[::-1]))

    assert not torch.equal(one, other)


def test_grey_leaves_the_luma_in_all_channels(apply: Apply) -> None:
    grey = apply(clip(), replace(NOTHING, grey=True))

    assert_rounded(grey, grey_of(clip())[..., None].expand(clip().shape))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_with_reflected_edges(apply: Apply, sigma: float) -> None:
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-((np.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    kernel /= kernel.sum()
    exact = clip().double().numpy()
    for axis in (1, 2):
        pad = [(radius, radius) if side == axis else (0, 0) for side in range(4)]
        padded = np.pad(exact, pad, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis)
        exact = windows @ kernel

    assert_rounded(apply(clip(), replace(NOTHING, blur_sigma=sigma)), torch.from_numpy(exact))


def test_mirror_flips_left_and_right(apply: Apply) -> None:
    assert torch.equal(apply(clip(), replace(NOTHING, mirror=True)), clip().flip(2))


def test_torch_and_opencv_give_the_same_pixels() -> None:
    rng = np.random.default_rng(3)
    for seed in range(40):
        drawn = draw_augmentation(rng, AugmentConfig())
        expected, found = augment(clip(seed), drawn), clip(seed)
        augment_by_torch(found, drawn)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01


def test_a_frame_does_not_depend_on_the_other_frames_of_its_clip() -> None:
    drawn = Augmentation((("contrast", 1.3), ("hue", 0.1), ("saturation", 0.7)), False, 1.2, True)

    together = augment(clip(size=300), drawn)

    alone = [augment(frame[None], drawn) for frame in clip(size=300)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_pixels_do_not_depend_on_the_number_of_threads(num_threads: int) -> None:
    drawn = Augmentation((("contrast", 1.3), ("hue", 0.1)), False, 1.2, False)
    expected = augment(clip(size=224), drawn)
    before = torch.get_num_threads()

    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(augment(clip(size=224), drawn), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_gives_the_pixels_of_the_cpu() -> None:
    drawn = Augmentation((("contrast", 1.3), ("hue", 0.1), ("brightness", 0.7)), True, 1.2, True)

    difference = augment(clip().cuda(), drawn).cpu().int() - augment(clip(), drawn).int()

    assert difference.abs().max() <= 1


def test_draws_are_as_frequent_and_as_strong_as_configured() -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig()

    drawn = [draw_augmentation(rng, config) for _ in range(4000)]

    share = {
        "jitter": np.mean([bool(one.jitter) for one in drawn]),
        "grey": np.mean([one.grey for one in drawn]),
        "blur": np.mean([one.blur_sigma > 0 for one in drawn]),
        "mirror": np.mean([one.mirror for one in drawn]),
    }
    assert share == pytest.approx({"jitter": 0.8, "grey": 0.2, "blur": 0.5, "mirror": 0.5}, abs=0.03)
    values = {name: [dict(one.jitter)[name] for one in drawn if one.jitter] for name in ("hue", "contrast")}
    assert (min(values["hue"]), max(values["hue"])) == pytest.approx((-0.1, 0.1), abs=0.001)
    assert (min(values["contrast"]), max(values["contrast"])) == pytest.approx((0.6, 1.4), abs=0.005)
    sigmas = [one.blur_sigma for one in drawn if one.blur_sigma]
    assert (min(sigmas), max(sigmas)) == pytest.approx((0.1, 2.0), abs=0.01)
    assert len({tuple(name for name, _ in one.jitter) for one in drawn if one.jitter}) == 24


def test_a_draw_takes_the_same_count_of_numbers_for_every_outcome() -> None:
    never = AugmentConfig(jitter_probability=0.0, blur_probability=0.0)
    first, second = np.random.default_rng(5), np.random.default_rng(5)

    draw_augmentation(first, AugmentConfig())
    draw_augmentation(second, never)

    assert first.random() == second.random()


@pytest.mark.parametrize("tree", [{"area": [0.5, 0.2]}, {"area": [0.2, 1.5]}, {"blur_sigma": [0.0, 1.0]}])
def test_an_invalid_range_is_refused(tree: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{next(iter(tree))}: found"):
        build_config(AugmentConfig, tree)

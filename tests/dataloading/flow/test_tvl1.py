from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dataloading.flow.estimators import dual_tvl1, opencv_flows
from dataloading.flow.tvl1 import tvl1_flow
from dataloading.flow.tvl1_config import TVL1Config
from dataloading.flow.tvl1_gpu import batch_flow

HEIGHT, WIDTH = 96, 128
THOROUGH = TVL1Config(first_steps=300, steps=300)  # the most that OpenCV takes


def texture(seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.asarray(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX))


def moved(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The image with each pixel (x, y) moved to matrix · (x, y, 1)."""
    size = (WIDTH, HEIGHT)
    return np.asarray(cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))


def estimate(earlier: np.ndarray, later: np.ndarray, config: TVL1Config) -> np.ndarray:
    flow = tvl1_flow(torch.from_numpy(earlier)[None], torch.from_numpy(later)[None], config)
    return flow[0].permute(1, 2, 0).numpy()


def rotated(degrees: float, zoom: float) -> np.ndarray:
    return np.asarray(cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), degrees, zoom))


@pytest.mark.parametrize(
    "matrix",
    [np.array([[1, 0, 2.5], [0, 1, -1.25]]), rotated(2.0, 1.0), rotated(0.0, 1.05)],
    ids=["shift", "rotation", "zoom"],
)
def test_a_known_motion_is_found_with_subpixel_accuracy(matrix: np.ndarray) -> None:
    earlier = texture()
    flow = estimate(earlier, moved(earlier, matrix), THOROUGH)
    down, across = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    truth = np.stack([across, down, np.ones_like(down)], axis=-1) @ matrix.T - np.stack([across, down], axis=-1)
    error = np.linalg.norm(flow - truth, axis=-1)[10:-10, 10:-10]
    assert np.median(error) < 0.1
    assert error.mean() < 0.2


def test_identical_frames_have_no_flow() -> None:
    frame = texture()
    flow = np.abs(estimate(frame, frame, TVL1Config()))
    assert flow.mean() < 0.001
    assert flow.max() < 0.1  # at the border, where rounding may move a place just outside


@pytest.mark.parametrize("size", [(96, 128), (61, 83), (16, 40), (8, 12)])
def test_a_pair_gives_the_same_bits_in_any_batch(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(5, 1, size[0] // 4, size[1] // 4, generator=generator) * 255
    earlier = torch.nn.functional.interpolate(noise, size=size, mode="bicubic")[:, 0].contiguous()
    later = earlier.roll((1, 2), dims=(1, 2))
    together = tvl1_flow(earlier, later)
    for pairs in (1, 3):
        parts = zip(earlier.split(pairs), later.split(pairs), strict=True)
        assert torch.equal(together, torch.cat([tvl1_flow(*part) for part in parts]))


def test_flow_is_float32_and_equal_for_bytes_and_floats() -> None:
    earlier = torch.from_numpy(texture())[None]
    later = earlier.roll(2, dims=2)
    flow = tvl1_flow(earlier, later)
    assert flow.dtype == torch.float32
    assert flow.shape == (1, 2, HEIGHT, WIDTH)
    assert torch.equal(flow, tvl1_flow(earlier.float(), later.float()))


@pytest.mark.parametrize("degrees", [0.05, 1.5])  # with almost no motion the state at the stop is the result
def test_with_opencvs_number_of_steps_the_flow_equals_opencvs(degrees: float) -> None:
    earlier = texture()
    later = moved(earlier, rotated(degrees, 1.0 + 0.02 * degrees))
    (expected,) = opencv_flows(dual_tvl1(), [earlier, later])
    flow = estimate(earlier, later, THOROUGH)
    assert np.linalg.norm(flow - expected, axis=-1).mean() < 0.001


def test_with_fewer_steps_the_flow_is_close_to_opencvs() -> None:
    earlier = texture()
    later = moved(earlier, rotated(1.5, 1.03))
    (expected,) = opencv_flows(dual_tvl1(), [earlier, later])
    flow = estimate(earlier, later, TVL1Config())
    assert np.linalg.norm(flow - expected, axis=-1)[10:-10, 10:-10].mean() < 0.1


def test_noise_has_a_finite_flow() -> None:
    earlier, later = np.random.default_rng(0).integers(0, 256, (2, 40, 50), dtype=np.uint8)
    assert np.isfinite(estimate(earlier, later, THOROUGH)).all()


@pytest.mark.slow
@pytest.mark.parametrize("config", [TVL1Config(), THOROUGH], ids=["default", "thorough"])
def test_the_batched_form_agrees_with_the_kernels(config: TVL1Config) -> None:
    earlier = np.stack([texture(3), texture(4)])
    later = np.stack([moved(earlier[0], rotated(1.0, 1.02)), earlier[1]])
    pairs = torch.from_numpy(earlier), torch.from_numpy(later)
    difference = (batch_flow(*pairs, config) - tvl1_flow(*pairs, config)).abs()
    assert difference.mean() < 0.03  # a warp may take one step more or less
    assert torch.equal(batch_flow(*pairs, config)[1:], batch_flow(pairs[0][1:], pairs[1][1:], config))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_kernels() -> None:
    earlier = np.stack([texture(3), texture(4)])
    later = np.stack([moved(earlier[0], rotated(1.0, 1.02)), earlier[1]])
    pairs = torch.from_numpy(earlier), torch.from_numpy(later)
    flow = tvl1_flow(pairs[0].cuda(), pairs[1].cuda())
    assert flow.is_cuda
    assert (flow.cpu() - tvl1_flow(*pairs)).abs().mean() < 0.02

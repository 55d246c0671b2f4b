from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dataloading.flow.estimators import dual_tvl1, opencv_flows
from dataloading.flow.tvl1 import TVL1Config, tvl1_flow
from dataloading.flow.tvl1_gpu import batch_flow

HEIGHT, WIDTH = 96, 128
THOROUGH = TVL1Config(first_steps=300, steps=300)  # as many as OpenCV allows


def texture(seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.asarray(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX))


def moved(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """What was at (x, y) is now at matrix · (x, y, 1)."""
    size = (WIDTH, HEIGHT)
    return np.asarray(cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))


def estimate(earlier: np.ndarray, later: np.ndarray, config: TVL1Config) -> np.ndarray:
    flow = tvl1_flow(torch.from_numpy(earlier)[None], torch.from_numpy(later)[None], config)
    return flow[0].permute(1, 2, 0).numpy()


def turned(degrees: float, zoom: float) -> np.ndarray:
    return np.asarray(cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), degrees, zoom))


@pytest.mark.parametrize(
    "matrix",
    [np.array([[1, 0, 2.5], [0, 1, -1.25]]), turned(2.0, 1.0), turned(0.0, 1.05)],
    ids=["shift", "rotation", "zoom"],
)
def test_a_known_motion_is_found_to_a_part_of_a_pixel(matrix: np.ndarray) -> None:
    earlier = texture()
    flow = estimate(earlier, moved(earlier, matrix), THOROUGH)
    down, across = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    truth = np.stack([across, down, np.ones_like(down)], axis=-1) @ matrix.T - np.stack([across, down], axis=-1)
    error = np.linalg.norm(flow - truth, axis=-1)[10:-10, 10:-10]
    assert np.median(error) < 0.1
    assert error.mean() < 0.2


def test_the_same_frame_twice_does_not_move() -> None:
    frame = texture()
    flow = np.abs(estimate(frame, frame, TVL1Config()))
    assert flow.mean() < 0.001
    assert flow.max() < 0.1  # on the rim, where a rounded place may lie outside by a hair


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


def test_flow_is_float32_and_bytes_do_as_well_as_floats() -> None:
    earlier = torch.from_numpy(texture())[None]
    later = earlier.roll(2, dims=2)
    flow = tvl1_flow(earlier, later)
    assert flow.dtype == torch.float32
    assert flow.shape == (1, 2, HEIGHT, WIDTH)
    assert torch.equal(flow, tvl1_flow(earlier.float(), later.float()))


@pytest.mark.parametrize("degrees", [0.05, 1.5])  # all but still, where the state in which it stops is the result
def test_with_as_many_steps_it_is_opencvs_flow(degrees: float) -> None:
    earlier = texture()
    later = moved(earlier, turned(degrees, 1.0 + 0.02 * degrees))
    (theirs,) = opencv_flows(dual_tvl1(), [earlier, later])
    ours = estimate(earlier, later, THOROUGH)
    assert np.linalg.norm(ours - theirs, axis=-1).mean() < 0.001


def test_with_fewer_steps_it_is_near_opencvs_flow() -> None:
    earlier = texture()
    later = moved(earlier, turned(1.5, 1.03))
    (theirs,) = opencv_flows(dual_tvl1(), [earlier, later])
    ours = estimate(earlier, later, TVL1Config())
    assert np.linalg.norm(ours - theirs, axis=-1)[10:-10, 10:-10].mean() < 0.1


def test_noise_has_a_flow_too() -> None:
    earlier, later = np.random.default_rng(0).integers(0, 256, (2, 40, 50), dtype=np.uint8)
    assert np.isfinite(estimate(earlier, later, THOROUGH)).all()


@pytest.mark.parametrize("config", [TVL1Config(), THOROUGH], ids=["default", "thorough"])
def test_a_batch_in_torch_agrees_with_the_kernels(config: TVL1Config) -> None:
    earlier = np.stack([texture(3), texture(4)])
    later = np.stack([moved(earlier[0], turned(1.0, 1.02)), earlier[1]])
    pairs = torch.from_numpy(earlier), torch.from_numpy(later)
    difference = (batch_flow(*pairs, config) - tvl1_flow(*pairs, config)).abs()
    assert difference.mean() < 0.03  # a step more or less after a warp
    assert torch.equal(batch_flow(*pairs, config)[1:], batch_flow(pairs[0][1:], pairs[1][1:], config))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_kernels() -> None:
    earlier = np.stack([texture(3), texture(4)])
    later = np.stack([moved(earlier[0], turned(1.0, 1.02)), earlier[1]])
    pairs = torch.from_numpy(earlier), torch.from_numpy(later)
    ours = tvl1_flow(pairs[0].cuda(), pairs[1].cuda())
    assert ours.is_cuda
    assert (ours.cpu() - tvl1_flow(*pairs)).abs().mean() < 0.02

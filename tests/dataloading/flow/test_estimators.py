from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataloading.flow.constants import ESTIMATORS
from dataloading.flow.estimators import FlowEstimator, flow_bytes, stack_components


def shifted_pair(across: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB frames, (96, 128, 3), of a smooth random texture that moves by (across, down) pixels."""
    noise = np.random.default_rng(3).integers(0, 256, (140, 180, 3), dtype=np.uint8)
    texture = cv2.GaussianBlur(noise, (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    earlier = texture[20:116, 20:148]
    later = texture[20 - down : 116 - down, 20 - across : 148 - across]
    return np.ascontiguousarray(earlier), np.ascontiguousarray(later)


def pixels(coded: np.ndarray) -> np.ndarray:
    return coded.astype(float) * 40 / 255 - 20


def flow_of(name: str, pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    (flow,) = FlowEstimator(name).flows(pair)
    return flow


@pytest.mark.parametrize("name", ESTIMATORS)
def test_flow_is_in_pixels_of_the_frame_across_then_down(name: str) -> None:
    flow = pixels(flow_of(name, shifted_pair(4, -2)))
    interior = flow[10:-10, 10:-10].reshape(-1, 2)
    np.testing.assert_allclose(np.median(interior, axis=0), [4, -2], atol=0.3)


@pytest.mark.parametrize(("name", "size"), [("tvl1", (96, 128)), ("opencv-tvl1", (48, 64)), ("dis", (96, 128))])
def test_flow_has_the_estimators_size(name: str, size: tuple[int, int]) -> None:
    assert FlowEstimator(name).size(96, 128) == size
    assert flow_of(name, shifted_pair(1, 0)).shape == (*size, 2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_flow_at_another_size_is_in_pixels_of_the_frame(name: str) -> None:
    estimator = FlowEstimator(name, scale=0.75)
    assert estimator.size(96, 128) == (72, 96)
    (flow,) = estimator.flows(shifted_pair(4, -2))
    assert flow.shape == (72, 96, 2)
    np.testing.assert_allclose(np.median(pixels(flow)[8:-8, 8:-8].reshape(-1, 2), axis=0), [4, -2], atol=0.4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_two_components_share_no_jpeg_block(name: str) -> None:
    heights = [FlowEstimator(name).size(height, 340)[0] for height in (32, 57, 240, 256, 270)]
    assert all(height and height % 8 == 0 for height in heights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_flow_of_a_pair_does_not_depend_on_other_pairs(name: str) -> None:
    before, after = shifted_pair(-6, 5)
    earlier, later = shifted_pair(2, 1)
    among_others = list(FlowEstimator(name).flows([before, after] * 20 + [earlier, later, after]))
    assert len(among_others) == 42
    np.testing.assert_array_equal(among_others[40], flow_of(name, (earlier, later)))


@pytest.mark.parametrize("frames", [0, 1])
def test_fewer_than_two_frames_have_no_flow(frames: int) -> None:
    assert list(FlowEstimator("tvl1").flows(shifted_pair(1, 0)[:frames])) == []


def test_bytes_span_twenty_pixels_either_way() -> None:
    coded = flow_bytes(np.array([-30.0, -20.0, -10.0, 0.1, 10.0, 20.0, 30.0]))
    assert coded.tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_the_stored_image_has_the_horizontal_component_above_the_vertical() -> None:
    flow = np.stack([np.full((3, 4), 7, np.uint8), np.full((3, 4), 9, np.uint8)], axis=-1)
    assert stack_components(flow).tolist() == [[7] * 4] * 3 + [[9] * 4] * 3

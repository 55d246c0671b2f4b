from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataloading.flow import FlowEstimator, flow_bytes, stacked


def shifted_pair(across: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB frames, (96, 128, 3), of a smooth random texture that moved by so many pixels."""
    noise = np.random.default_rng(3).integers(0, 256, (140, 180, 3), dtype=np.uint8)
    texture = cv2.GaussianBlur(noise, (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    earlier = texture[20:116, 20:148]
    later = texture[20 - down : 116 - down, 20 - across : 148 - across]
    return np.ascontiguousarray(earlier), np.ascontiguousarray(later)


def pixels(coded: np.ndarray) -> np.ndarray:
    return coded.astype(float) * 40 / 255 - 20


@pytest.mark.parametrize("name", ["tvl1", "dis"])
def test_flow_is_in_pixels_of_the_frame_across_then_down(name: str) -> None:
    flow = pixels(FlowEstimator(name)(*shifted_pair(4, -2)))
    inside = flow[10:-10, 10:-10].reshape(-1, 2)
    np.testing.assert_allclose(np.median(inside, axis=0), [4, -2], atol=0.3)


@pytest.mark.parametrize(("name", "size"), [("tvl1", (48, 64)), ("dis", (96, 128))])
def test_flow_has_the_estimators_size(name: str, size: tuple[int, int]) -> None:
    estimate = FlowEstimator(name)
    assert estimate.size(96, 128) == size
    assert estimate(*shifted_pair(1, 0)).shape == (*size, 2)


@pytest.mark.parametrize("name", ["tvl1", "dis"])
def test_a_pair_gives_the_same_flow_whatever_came_before(name: str) -> None:
    used, fresh = FlowEstimator(name), FlowEstimator(name)
    used(*shifted_pair(-6, 5))
    np.testing.assert_array_equal(used(*shifted_pair(2, 1)), fresh(*shifted_pair(2, 1)))


def test_bytes_span_twenty_pixels_either_way() -> None:
    coded = flow_bytes(np.array([-30.0, -20.0, -10.0, 0.1, 10.0, 20.0, 30.0]))
    assert coded.tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_the_stored_picture_has_the_horizontal_component_above_the_vertical() -> None:
    flow = np.stack([np.full((3, 4), 7, np.uint8), np.full((3, 4), 9, np.uint8)], axis=-1)
    assert stacked(flow).tolist() == [[7] * 4] * 3 + [[9] * 4] * 3

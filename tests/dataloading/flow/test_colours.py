from __future__ import annotations

import numpy as np
import pytest

from dataloading.flow.colours import colour_wheel, flow_colours


def colour(across: float, down: float, full: float = 1.0) -> list[int]:
    flow_hw2 = np.array([[[across, down]]], dtype=np.float32)
    return [int(value) for value in flow_colours(flow_hw2, full)[0, 0]]


# Computed by hand from the benchmark's colour code: position on the wheel of 55 colours, then interpolation.
@pytest.mark.parametrize(
    ("across", "down", "expected"),
    [(1, 0, [255, 0, 0]), (0, 1, [255, 229, 0]), (-1, 0, [0, 209, 255]), (0, -1, [88, 0, 255])],
)
def test_a_direction_has_the_benchmarks_colour(across: float, down: float, expected: list[int]) -> None:
    assert colour(across, down) == expected


def test_no_motion_is_white() -> None:
    assert colour(0, 0) == [255, 255, 255]


def test_half_the_speed_has_half_the_distance_from_white() -> None:
    assert colour(2, 0, full=4) == [255, 127, 127]


def test_motion_faster_than_the_rim_is_darker() -> None:
    assert colour(9, 0, full=4) == [191, 0, 0]


def test_the_wheel_shows_each_direction_at_its_angle() -> None:
    wheel = colour_wheel(65)
    assert wheel[32, 64].tolist() == [255, 0, 0, 255]
    assert wheel[64, 32].tolist() == [255, 229, 0, 255]
    assert wheel[32, 32].tolist() == [255, 255, 255, 255]
    assert wheel[0, 0, 3] == 0

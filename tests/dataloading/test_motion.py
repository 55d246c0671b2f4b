from __future__ import annotations

import numpy as np
import pytest
import torch

from dataloading.motion import MotionBoundary, motion_target, summarise_motion

STILL = 128


def random_flow(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def moving_square(num_frames: int, first_moving: int) -> np.ndarray:
    """Zero flow, except for a square in a cell at the top right from frame `first_moving` on."""
    flow = np.full((num_frames, 70, 70, 2), STILL, dtype=np.uint8)
    flow[first_moving:, 12:18, 52:58] = 200
    return flow


def test_a_steady_camera_has_no_motion() -> None:
    flow = np.full((6, 64, 64, 2), 40, dtype=np.uint8)
    summary = summarise_motion(flow, map_window=4, clip_window=4)
    assert not summary.frame_maps().any()
    assert not summary.clip_scores().any()


def test_a_running_window_equals_a_single_window() -> None:
    flow = random_flow(9, 40, 48, 2)
    running = MotionBoundary(4)
    magnitudes = [running.add(item) for item in flow]
    assert [magnitude is None for magnitude in magnitudes] == [True] * 3 + [False] * 6
    single = MotionBoundary(4)
    last = [single.add(item) for item in flow[5:]][-1]
    np.testing.assert_array_equal(magnitudes[-1], last)


def test_every_frame_has_a_map_and_every_start_a_score() -> None:
    summary = summarise_motion(random_flow(10, 40, 48, 2), map_window=4, clip_window=6)
    assert summary.frame_maps().shape == (10, 7, 7)
    assert summary.clip_scores().shape == (5,)


def test_a_video_of_one_window_has_one_score() -> None:
    summary = summarise_motion(random_flow(6, 40, 48, 2), map_window=4, clip_window=6)
    assert summary.clip_scores().shape == (1,)


def test_the_strongest_cell_is_where_the_motion_is() -> None:
    maps = summarise_motion(moving_square(8, 0), map_window=4, clip_window=8).frame_maps()
    assert np.unravel_index(maps[3].argmax(), (7, 7)) == (1, 5)


def test_a_clip_with_more_moving_frames_has_a_higher_score() -> None:
    scores = summarise_motion(moving_square(12, 6), map_window=4, clip_window=6).clip_scores()
    assert (np.diff(scores) > 0).all()


def test_a_target_follows_its_clip_in_time_and_space() -> None:
    target = motion_target(torch.from_numpy(moving_square(8, 4))[None], (2, 7, 7))
    assert not target[0, 0].any()
    assert np.unravel_index(int(target[0, 1].argmax()), (7, 7)) == (1, 5)


@pytest.mark.slow
def test_a_mirrored_clip_has_a_mirrored_target() -> None:
    flow = torch.from_numpy(random_flow(2, 8, 28, 28, 2))
    target = motion_target(flow, (4, 7, 7))
    torch.testing.assert_close(motion_target(flow.flip(3), (4, 7, 7)), target.flip(3))


def test_a_grid_that_does_not_divide_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        motion_target(torch.zeros(1, 8, 28, 28, 2, dtype=torch.uint8), (3, 7, 7))

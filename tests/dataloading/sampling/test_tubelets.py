from __future__ import annotations

import numpy as np
import pytest

from dataloading.sampling.tubelets import (
    Box,
    CutConfig,
    MotionRegion,
    draw_crop,
    draw_motion_starts,
    draw_tubelets,
    draw_uniform_starts,
    motion_region,
)

CONFIG = CutConfig(frames=16, stride=2, motion_probability=0.7, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
DRAWS = [draw_motion_starts, draw_uniform_starts]


def starts(draw, num_frames: int, order: int, num: int = 200) -> np.ndarray:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(num_frames)
    scores = rng.random(num_frames - 31)
    span = {"num_frames": num_frames, "window": 32, "order": order}
    focused = draw is draw_motion_starts
    return np.array([draw(rng, scores, **span) if focused else draw(rng, **span) for _ in range(num)])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("num_frames", [64, 65, 66, 67, 100, 301])
def test_a_clip_never_leaves_its_half(draw, num_frames: int) -> None:  # type: ignore[no-untyped-def]
    middle = num_frames // 2

    for order in (0, 1):
        drawn = starts(draw, num_frames, order)
        first = drawn[:, :1] if order else drawn[:, 1:]
        second = drawn[:, 1:] if order else drawn[:, :1]
        assert first.min() >= 1
        assert first.max() + 31 <= middle
        assert second.max() + 31 <= num_frames
        # If a half has no motion-focused start, the starts are 1 and the window's length.
        assert second.min() >= min(middle, 32)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_two_later_clips_are_sorted_in_time(draw) -> None:  # type: ignore[no-untyped-def]
    for order in (0, 1):
        drawn = starts(draw, 200, order)
        assert (drawn[:, 1] <= drawn[:, 2]).all()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("num_frames", [32, 33, 34, 50, 63])
def test_starts_in_short_videos_agree_with_the_order_label(draw, num_frames: int) -> None:  # type: ignore[no-untyped-def]
    ascending, late_first = starts(draw, num_frames, 1), starts(draw, num_frames, 0)

    assert (np.diff(ascending, axis=1) >= 0).all()
    assert np.array_equal(late_first, np.sort(late_first, axis=1)[:, [2, 0, 1]])
    for drawn in (ascending, late_first):
        assert drawn.min() >= 1
        assert drawn.max() + 31 <= num_frames


def test_a_video_of_one_window_starts_at_its_first_frame() -> None:
    assert starts(draw_motion_starts, 32, order=1).max() == 1


def test_motion_focused_starts_are_the_best_half_by_score() -> None:
    num_frames = 200
    scores = np.arange(num_frames - 31, dtype=float)
    rng = np.random.default_rng(0)

    drawn = np.array([draw_motion_starts(rng, scores, num_frames=num_frames, window=32, order=1) for _ in range(500)])

    # 68 starts in the first half, of which the best 35 are the latest.
    assert (drawn[:, 0].min(), drawn[:, 0].max()) == (34, 68)
    assert (drawn[:, 1:].min(), drawn[:, 1:].max()) == (133, 167)


def test_the_motion_region_contains_the_four_strongest_cells() -> None:
    mean_map = np.zeros((7, 7))
    mean_map[2:4, 5:7] = [[4, 3], [2, 1]]

    assert motion_region(mean_map, 70, 140) == MotionRegion(20.0, 40.0, 100.0, 140.0, 0.9)


@pytest.mark.parametrize(
    ("bottom", "right", "cover"), [(2, 2, 0.9), (4, 2, 0.8), (6, 2, 0.7), (7, 2, 0.0), (1, 7, 0.8)]
)
def test_a_larger_region_requires_less_coverage(bottom: int, right: int, cover: float) -> None:
    cells = [(0, 0), (0, 1), (bottom - 1, right - 1), (bottom - 1, right - 2)]
    mean_map = np.zeros((7, 7))
    mean_map[tuple(np.transpose(cells))] = 1

    assert motion_region(mean_map, 7, 7).cover == cover


def test_a_clip_without_motion_has_no_required_coverage() -> None:
    assert motion_region(np.zeros((7, 7)), 70, 140) == MotionRegion(0.0, 70.0, 0.0, 140.0, 0.0)


@pytest.mark.parametrize(("height", "width"), [(256, 340), (56, 56), (340, 256), (7, 9)])
def test_a_crop_never_leaves_its_frame(height: int, width: int) -> None:
    rng = np.random.default_rng(1)

    for _ in range(300):
        region = motion_region(rng.random((7, 7)), height, width)
        box = draw_crop(rng, region, height=height, width=width, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
        assert min(box) >= 0
        assert min(box.height, box.width) > 0
        assert box.top + box.height <= height
        assert box.left + box.width <= width


def test_a_crop_that_can_cover_the_region_nearly_always_does() -> None:
    rng = np.random.default_rng(2)
    region = MotionRegion(100.0, 130.0, 100.0, 130.0, 0.9)

    boxes = [draw_crop(rng, region, height=256, width=340, area=(0.5, 0.6), aspect=(1.0, 1.0)) for _ in range(300)]

    assert all(covered_share(box, region) >= 0.9 for box in boxes)


def test_a_frame_that_no_shape_fits_gets_a_crop_that_contains_the_region() -> None:
    rng = np.random.default_rng(3)
    region = MotionRegion(10.5, 20.5, 300.5, 320.5, 0.9)

    boxes = [draw_crop(rng, region, height=30, width=900, area=(0.9, 1.0), aspect=(1.0, 1.0)) for _ in range(200)]

    for box in boxes:
        assert covered_share(box, region) == 1
        assert box.top + box.height <= 30
        assert box.left + box.width <= 900
        kept_top_left = (box.top, box.left) == (10, 300)
        kept_bottom_right = (box.top + box.height, box.left + box.width) == (21, 321)
        assert kept_top_left or kept_bottom_right


def test_query_and_first_key_share_their_clip_but_not_their_crop() -> None:
    rng = np.random.default_rng(4)

    _, (query, first, second, _) = tubelets(rng, num_frames=200)

    assert np.array_equal(query.frames, first.frames)
    assert query.box != first.box
    assert not np.array_equal(query.frames, second.frames)


def test_a_clip_has_every_second_frame_of_its_window() -> None:
    for _, views in (tubelets(np.random.default_rng(seed), num_frames=40) for seed in range(20)):
        for view in views:
            assert np.array_equal(np.diff(view.frames), np.full(15, 2))
            assert view.frames[0] >= 0
            assert view.frames[0] + 31 < 40


def test_the_order_label_is_a_fair_coin() -> None:
    labels = [tubelets(np.random.default_rng(seed), num_frames=200)[0] for seed in range(400)]

    assert 160 < sum(labels) < 240


def test_motion_focused_draws_are_as_frequent_as_configured() -> None:
    scores = np.zeros(169)
    scores[[0, 150]] = 1.0  # a third of the uniform draws are outside the best half
    never, always = (
        [tubelets(np.random.default_rng(seed), 200, scores, share)[1] for seed in range(100)] for share in (0.0, 1.0)
    )

    # The best half of equal scores has the earlier starts, so none is in the later half of either half.
    assert max(view.frames[0] for views in always for view in views) < 150.5
    assert max(view.frames[0] for views in never for view in views) > 160


def test_without_motion_crops_a_crop_may_miss_the_motion_region() -> None:
    maps = np.zeros((200, 7, 7), np.uint8)
    maps[:, 1:3, 3:5] = 255
    covers = {}
    for motion_crops in (True, False):
        config = CutConfig(16, 2, 0.7, (0.2, 0.3), CONFIG.aspect, motion_crops)
        views = [
            draw_tubelets(
                np.random.default_rng(seed), config, frame_maps=maps, clip_scores=np.ones(169), height=256, width=340
            )[1]
            for seed in range(20)
        ]
        region = motion_region(maps.mean(axis=0), 256, 340)
        covers[motion_crops] = np.mean([covered_share(view.box, region) for four in views for view in four])
    assert covers[True] > 0.85
    assert covers[False] < 0.6


def tubelets(rng, num_frames, scores=None, motion_probability=0.7):  # type: ignore[no-untyped-def]
    config = CutConfig(16, 2, motion_probability, CONFIG.area, CONFIG.aspect)
    maps = np.random.default_rng(0).integers(0, 255, (num_frames, 7, 7), dtype=np.uint8)
    scores = np.ones(num_frames - 31) if scores is None else scores
    return draw_tubelets(rng, config, frame_maps=maps, clip_scores=scores, height=256, width=340)


def covered_share(box: Box, region: MotionRegion) -> float:
    rows = min(box.top + box.height, region.bottom) - max(box.top, region.top)
    columns = min(box.left + box.width, region.right) - max(box.left, region.left)
    area = (region.bottom - region.top) * (region.right - region.left)
    return max(rows, 0) * max(columns, 0) / area

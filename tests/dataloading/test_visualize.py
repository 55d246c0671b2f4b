from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.reading.shard_set import ShardSet
from dataloading.sampling.epoch_order import sample_generator
from dataloading.sampling.tubelets import best_starts, draw_tubelets
from dataloading.visualize import cut_config, decode_flow, inspect_video, sample_positions
from mcl_dist.errors import UserError

WriteSet = Callable[..., Path]


def test_a_sample_depends_on_the_seed_and_repeats_no_video() -> None:
    drawn = sample_positions(50, 20, seed=3)
    assert drawn == sample_positions(50, 20, seed=3) != sample_positions(50, 20, seed=4)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20


def test_the_sample_of_a_small_set_is_the_whole_set() -> None:
    assert sample_positions(3, 20, seed=0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("window", "frames", "stride"), [(32, 16, 2), (16, 16, 1), (64, 16, 4), (8, 8, 1), (31, 31, 1)]
)
def test_a_clip_spans_the_window_of_the_set(window: int, frames: int, stride: int) -> None:
    cut = cut_config(window)
    assert (cut.frames, cut.stride, cut.window) == (frames, stride, window)


def test_the_views_equal_those_of_the_training_draw(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([24, 40])))
    shown = inspect_video(shard_set, 1, seed=5)
    video = shard_set.read(1)
    order, tubelets = draw_tubelets(
        sample_generator(5, 0, 1),
        cut_config(8),
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        height=video.height,
        width=video.width,
    )
    assert shown.order == order
    assert [view.tubelet.box for view in shown.views] == [tubelet.box for tubelet in tubelets]
    for view, tubelet in zip(shown.views, tubelets, strict=True):
        np.testing.assert_array_equal(view.tubelet.frames, tubelet.frames)


@pytest.mark.slow
def test_every_clip_starts_at_a_candidate(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([40])))
    best = np.concatenate(best_starts(shard_set.read(0).clip_scores, num_frames=40, window=8)) - 1
    for seed in range(10):
        shown = inspect_video(shard_set, 0, seed)
        assert shown.candidates.tolist() == sorted(best)
        assert {int(view.tubelet.frames[0]) for view in shown.views} <= set(shown.candidates.tolist())


def test_a_video_under_two_windows_has_no_candidates(write_set: WriteSet) -> None:
    assert not len(inspect_video(ShardSet(str(write_set([15]))), 0, seed=0).candidates)


def test_a_crop_shows_its_box_of_the_frame(write_set: WriteSet) -> None:
    shown = inspect_video(ShardSet(str(write_set([40]))), 0, seed=0)
    for view in shown.views:
        top, left, height, width = view.tubelet.box
        for _, image, crop in view.frame_images:
            # The frames of the set are smaller than the size limit of images, so they were not shrunk.
            expected = cv2.resize(image[top : top + height, left : left + width], crop.shape[1::-1])
            assert np.abs(crop.astype(int) - expected).mean() < 2


def test_sampled_frames_are_evenly_spaced_over_the_video(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([40])))
    shown = inspect_video(shard_set, 0, seed=0)
    assert [sampled.frame for sampled in shown.frame_images] == [0, 6, 11, 17, 22, 28, 33, 39]
    for sampled in shown.frame_images:
        np.testing.assert_array_equal(sampled.frame_map, shard_set.read(0).frame_maps[sampled.frame])


@pytest.mark.slow
def test_the_upper_half_of_a_flow_still_is_horizontal_and_the_lower_half_vertical(synthetic_shards: Path) -> None:
    video = ShardSet(str(synthetic_shards)).read(0)
    still = cv2.imdecode(video.flow([3])[0], cv2.IMREAD_GRAYSCALE).astype(float)
    horizontal, vertical = np.split(still * 40 / 255 - 20, 2)
    flow_hw2 = decode_flow(video, [3])[0]
    # Two decoders may differ by a byte, which is 0.16 px.
    np.testing.assert_allclose(flow_hw2[..., 0], horizontal, atol=0.2)
    np.testing.assert_allclose(flow_hw2[..., 1], vertical, atol=0.2)


def test_a_video_without_clip_scores_is_an_error_of_one_line(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([5], window=8)))
    with pytest.raises(UserError, match="video-0: its clip scores do not fit its 5 frames"):
        inspect_video(shard_set, 0, seed=0)


def test_the_info_of_a_video_is_read_as_stored(write_set: WriteSet) -> None:
    info = ShardSet(str(write_set([12]))).read(0).info()
    assert (info["key"], info["frames"], info["height"]) == ("video-0", 12, 40)

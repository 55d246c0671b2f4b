from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.reading.shard_set import ShardSet
from dataloading.sampling.epoch_order import sample_generator
from dataloading.sampling.tubelets import best_starts, draw_tubelets
from dataloading.visualize import cut_config, decoded_flow, inspect_video, sample_positions
from mcl_dist.errors import UserError

WriteSet = Callable[..., Path]


def test_a_sample_is_the_same_for_a_seed_and_repeats_no_video() -> None:
    drawn = sample_positions(50, 20, seed=3)
    assert drawn == sample_positions(50, 20, seed=3) != sample_positions(50, 20, seed=4)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20


def test_a_small_set_is_shown_whole() -> None:
    assert sample_positions(3, 20, seed=0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("window", "frames", "stride"), [(32, 16, 2), (16, 16, 1), (64, 16, 4), (8, 8, 1), (31, 31, 1)]
)
def test_a_clip_spans_the_sets_window(window: int, frames: int, stride: int) -> None:
    cut = cut_config(window)
    assert (cut.frames, cut.stride, cut.window) == (frames, stride, window)


def test_the_views_are_those_that_training_would_draw(write_set: WriteSet) -> None:
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


def test_every_start_is_one_of_the_candidates(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([40])))
    best = np.concatenate(best_starts(shard_set.read(0).clip_scores, num_frames=40, window=8)) - 1
    for seed in range(10):
        shown = inspect_video(shard_set, 0, seed)
        assert shown.candidates.tolist() == sorted(best)
        assert {int(view.tubelet.frames[0]) for view in shown.views} <= set(shown.candidates.tolist())


def test_a_video_under_two_windows_has_no_candidates(write_set: WriteSet) -> None:
    assert not len(inspect_video(ShardSet(str(write_set([15]))), 0, seed=0).candidates)


def test_a_cut_out_shows_the_crop_of_its_frame(write_set: WriteSet) -> None:
    shown = inspect_video(ShardSet(str(write_set([40]))), 0, seed=0)
    for view in shown.views:
        top, left, height, width = view.tubelet.box
        for _, picture, cut_out in view.moments:
            # The set's frames are smaller than pictures are shown, so nothing was shrunk.
            crop = cv2.resize(picture[top : top + height, left : left + width], cut_out.shape[1::-1])
            assert np.abs(cut_out.astype(int) - crop).mean() < 2


def test_moments_are_spread_over_the_whole_video(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([40])))
    shown = inspect_video(shard_set, 0, seed=0)
    assert [moment.frame for moment in shown.moments] == [0, 6, 11, 17, 22, 28, 33, 39]
    for moment in shown.moments:
        np.testing.assert_array_equal(moment.motion, shard_set.read(0).frame_maps[moment.frame])


def test_flow_is_read_across_from_above_and_down_from_below(synthetic_shards: Path) -> None:
    video = ShardSet(str(synthetic_shards)).read(0)
    still = cv2.imdecode(video.flow([3])[0], cv2.IMREAD_GRAYSCALE).astype(float)
    across, down = np.split(still * 40 / 255 - 20, 2)
    flow_hw2 = decoded_flow(video, [3])[0]
    # Two decoders may differ by a byte, which is 0.16 px.
    np.testing.assert_allclose(flow_hw2[..., 0], across, atol=0.2)
    np.testing.assert_allclose(flow_hw2[..., 1], down, atol=0.2)


def test_a_video_without_clip_scores_is_told_in_one_line(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([5], window=8)))
    with pytest.raises(UserError, match="video-0: its clip scores do not fit its 5 frames"):
        inspect_video(shard_set, 0, seed=0)


def test_a_videos_own_words_are_read_as_they_were_stored(write_set: WriteSet) -> None:
    info = ShardSet(str(write_set([12]))).read(0).info()
    assert (info["key"], info["frames"], info["height"]) == ("video-0", 12, 40)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dataloading.loader.config import ReadingConfig
from dataloading.loader.probe_clips import ClipGeometry, ClipsConfig, ProbeClips, clip_frames, clip_starts, crop_windows
from dataloading.reading.shard_set import ShardSet
from dataloading.shards.bad_sample import BadSampleError
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.evaluation.features import rank_range

WriteSet = Callable[..., Path]
CPU = torch.device("cpu")


def probe_clips(shard_set: ShardSet, geometry: ClipGeometry, num_clips: int = 3) -> ProbeClips:
    return ProbeClips(shard_set, geometry, device=CPU, num_clips=num_clips, batch_videos=2, threads=1)


@pytest.mark.parametrize("num_frames", [1, 7, 31, 32, 33, 63, 64, 639, 640, 2000])
def test_no_clip_reads_past_the_end_of_its_video(num_frames: int) -> None:
    frames = clip_frames(num_frames, 16, 2, 20)
    assert frames.shape == (20, 16)
    assert frames.min() >= 0
    assert frames.max() < num_frames


def test_starts_are_evenly_spaced_from_the_first_frame_to_the_last_whole_window() -> None:
    starts, repeats = clip_starts(72, 16, 2, 9)
    assert (starts[0], starts[-1], repeats) == (1, 41, 1)
    assert set(np.diff(starts)) == {5}


def test_a_single_clip_starts_at_the_first_frame() -> None:
    starts, _ = clip_starts(40, 16, 2, 1)
    assert starts.tolist() == [1]


def test_every_video_comes_once_in_the_order_of_the_set(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([20, 24, 9, 16, 30])))
    batches = probe_clips(shard_set, ClipGeometry(4, 2, 24))
    found = list(batches)
    assert len(found) == len(batches) == 3
    assert torch.cat([batch.positions for batch in found]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([batch.labels for batch in found]).tolist() == shard_set.labels.tolist()
    assert found[0].clips.shape == (2, 3, 4, 24, 24, 3)
    assert found[0].clips.dtype == torch.uint8


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_clips_decoded_on_a_cpu_are_copied_to_the_device(write_set: WriteSet, device: str) -> None:
    shard_set = ShardSet(str(write_set([20, 24])))
    copied = ProbeClips(
        shard_set, ClipGeometry(4, 2, 24), device=torch.device(device), decoder_device=CPU, num_clips=3, batch_videos=2
    )
    (batch,), (here,) = copied, probe_clips(shard_set, ClipGeometry(4, 2, 24))
    assert (batch.clips.device, batch.clips.shape) == (torch.device(device), here.clips.shape)
    if device != "meta":  # a meta tensor has no values
        assert torch.equal(batch.clips.cpu(), here.clips)


def test_a_clip_shows_the_centre_of_its_frames(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([20])))
    (batch,) = probe_clips(shard_set, ClipGeometry(4, 2, 24))
    video = shard_set.read(0)
    frames = clip_frames(20, 4, 2, 3)
    for clip in range(3):
        for step in range(4):
            (still,) = video.frames([int(frames[clip, step])])
            whole = cv2.imdecode(still, cv2.IMREAD_COLOR)[..., ::-1]
            expected = whole[8:32, 16:40].astype(int)
            assert np.abs(batch.clips[0, clip, step].numpy() - expected).max() <= 3


def test_a_crop_larger_than_the_short_side_takes_a_square_and_scales_it_up(write_set: WriteSet) -> None:
    assert crop_windows(40, 56, 48).tolist() == [[0, 8, 40, 40]]
    (batch,) = probe_clips(ShardSet(str(write_set([10]))), ClipGeometry(4, 2, 48))
    assert batch.clips.shape[-3:] == (48, 48, 3)


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [(40, 56, [(4, 0), (4, 12), (4, 24)]), (56, 40, [(0, 4), (12, 4), (24, 4)]), (40, 40, [(0, 4), (4, 4), (8, 4)])],
)
def test_three_crops_lie_along_the_longer_side(height: int, width: int, corners: list[tuple[int, int]]) -> None:
    assert crop_windows(height, width, 32, 3).tolist() == [[*corner, 32, 32] for corner in corners]


def test_each_of_three_crops_shows_its_own_window(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([20])))
    geometry = ClipGeometry(4, 2, 24)
    (three,) = ProbeClips(shard_set, geometry, device=CPU, num_clips=3, num_crops=3, threads=1)
    (centre,) = probe_clips(shard_set, geometry)
    left, middle, right = three.clips[0].chunk(3)
    assert np.abs(middle.numpy().astype(int) - centre.clips[0].numpy()).max() <= 1
    video = shard_set.read(0)
    frames = clip_frames(20, 4, 2, 3)
    for crop, first in ((left, 0), (right, 32)):
        (still,) = video.frames([int(frames[2, 1])])
        whole = cv2.imdecode(still, cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(crop[2, 1].numpy() - whole[8:32, first : first + 24].astype(int)).max() <= 3


def test_two_crops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clips\.crops: found 2"):
        ClipsConfig(crops=2)


def test_clips_may_be_limited_to_a_range_of_positions(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([20, 24, 9, 16, 30])))
    found = list(ProbeClips(shard_set, ClipGeometry(4, 2, 24), device=CPU, num_clips=1, positions=range(1, 4)))
    assert torch.cat([batch.positions for batch in found]).tolist() == [1, 2, 3]


def test_a_video_shorter_than_a_clip_is_stretched(write_set: WriteSet) -> None:
    (batch,) = probe_clips(ShardSet(str(write_set([3]))), ClipGeometry(4, 2, 24), num_clips=1)
    assert clip_frames(3, 4, 2, 1).tolist() == [[0, 0, 1, 2]]
    assert torch.equal(batch.clips[0, 0, 0], batch.clips[0, 0, 1])


def test_the_error_for_an_undecodable_still_names_shard_and_video(
    write_set: WriteSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("DALI cannot decode a still (a reason)")

    shard_set = ShardSet(str(write_set([20])))
    monkeypatch.setattr("dataloading.loader.probe_clips.StillDecoder.__call__", refuse)
    with pytest.raises(BadSampleError, match=rf"shard-.*, video {shard_set.keys[0]}: DALI cannot decode a still"):
        list(probe_clips(shard_set, ClipGeometry(4, 2, 24)))


def test_a_rank_gets_its_share_of_the_set_one_video_a_batch(write_set: WriteSet) -> None:
    shard_set = ShardSet(str(write_set([20, 24, 9, 16, 30])))
    group, data = ProcessGroup(CPU), ReadingConfig(decode_on="cpu")
    group.rank, group.size = 1, 2

    share = ProbeClips.for_rank(shard_set, ClipGeometry(4, 2, 24), group, data, num_clips=1, threads=1)
    given = ProbeClips.for_rank(
        shard_set, ClipGeometry(4, 2, 24), group, data, num_clips=1, threads=1, positions=range(2), batch_videos=2
    )

    assert [batch.positions.tolist() for batch in share] == [[position] for position in rank_range(5, group)]
    assert [batch.positions.tolist() for batch in given] == [[0, 1]]

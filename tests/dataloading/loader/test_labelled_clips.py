"""Clips with their classes, one per video, for classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading.loader.config import LabelledConfig
from dataloading.loader.loader import LabelledLoader
from dataloading.loader.video_source import VideoSource
from dataloading.reading.shard_set import ShardSet
from dataloading.sampling.tubelets import CutConfig, draw_clip
from mcl_dist.batch import LabelledBatch

CUT = CutConfig(frames=4, stride=3, motion_probability=0.0, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))
GLOBAL_BATCH = 4


def config(shards: Path, **changes: int) -> LabelledConfig:
    return LabelledConfig(**{"train": str(shards), "frames": 32, "stride": 2, "crop": 32, **changes})


def batches(config: LabelledConfig, rank: int = 0, num_ranks: int = 1, start: int = 0) -> Iterator[LabelledBatch]:
    """The batches of the steps from `start` to 5."""
    shape = {"seed": 3, "global_batch": GLOBAL_BATCH, "rank": rank, "num_ranks": num_ranks, "grid": None}
    device = torch.device("cpu")
    with closing(LabelledLoader(config, device=device, start_step=start, **shape)) as loader:
        yield from islice(loader, 6 - start)


def digest(batch: LabelledBatch) -> list[torch.Tensor]:
    return [batch.views, batch.samples, batch.boxes, batch.labels]


def test_a_clip_starts_anywhere_and_its_frames_are_a_stride_apart() -> None:
    rng = np.random.default_rng(0)
    clips = [draw_clip(rng, CUT, num_frames=14, height=60, width=80) for _ in range(200)]
    assert {int(clip.frames[0]) for clip in clips} == {0, 1, 2}
    assert all((np.diff(clip.frames) == 3).all() for clip in clips)
    areas = [clip.box.height * clip.box.width / (60 * 80) for clip in clips]
    assert min(areas) < 0.3
    assert max(areas) > 0.8


def test_a_video_shorter_than_a_clip_is_stretched_by_repeating_frames() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_clip(rng, CUT, num_frames=5, height=60, width=80).frames.tolist() for _ in range(100)]
    # Three times five frames for a window of twelve: starts 0 to 3 of the stretched video.
    assert {tuple(frames) for frames in drawn} == {(0, 1, 2, 3), (1, 2, 3, 4)}


@pytest.mark.slow
def test_a_batch_has_the_classes_of_its_videos(synthetic_shards: Path) -> None:
    with closing(ShardSet(str(synthetic_shards))) as stored:
        labels = torch.from_numpy(stored.labels)
    for batch in batches(config(synthetic_shards)):
        assert batch.views.shape == (GLOBAL_BATCH, 1, 32, 32, 32, 3)
        assert torch.equal(batch.labels, labels[batch.samples])


def test_a_global_batch_does_not_depend_on_ranks_or_restarts(synthetic_shards: Path) -> None:
    settings = config(synthetic_shards)
    whole = [digest(batch) for batch in batches(settings)]
    ranks = zip(*(batches(settings, rank, 2) for rank in range(2)), strict=True)
    for expected, parts in zip(whole, ranks, strict=True):
        assert all(map(torch.equal, expected, map(torch.cat, zip(*map(digest, parts), strict=True))))
    for expected, batch in zip(whole[3:], batches(settings, start=3), strict=True):
        assert all(map(torch.equal, expected, digest(batch)))


@pytest.mark.slow
def test_worker_processes_make_the_same_batches(synthetic_shards: Path) -> None:
    here, in_worker = (batches(config(synthetic_shards, workers=count)) for count in (0, 1))
    for expected, batch in zip(here, in_worker, strict=True):
        assert all(map(torch.equal, digest(expected), digest(batch)))


def test_each_still_is_read_once_and_flow_is_not_read(synthetic_shards: Path) -> None:
    # 48 frames at stride 2 span 96 of the video's 72: each frame is repeated.
    settings = config(synthetic_shards, frames=48)
    with closing(VideoSource(settings, seed=3, global_batch=GLOBAL_BATCH, rank=0, num_ranks=1)) as source:
        videos, _ = source.videos(0)
    for video in videos:
        assert len(video.frame_index) == 48
        assert len(video.frames) == len(set(video.frame_index.tolist())) == 48
        assert not video.flow

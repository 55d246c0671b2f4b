"""A set that stores every second frame, compared with a set of the same videos that stores all."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading.build.builder import build_shards
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.verify import verify_shards
from dataloading.build.video_processor import VideoProcessor
from dataloading.loader.augment import AugmentConfig
from dataloading.loader.config import DataConfig
from dataloading.loader.loader import TubeletLoader
from dataloading.loader.probe_clips import ClipGeometry, ProbeClips
from dataloading.reading.shard_set import ShardSet
from dataloading.shards.format import Sample
from dataloading.synthetic.videos import FPS, write_video
from dataloading.videos.sources import Source, find_videos
from dataloading.visualize import inspect_video
from mcl_dist.batch import TubeletBatch
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder

WINDOW = 8  # frames of the video: a clip of 4 frames at stride 2
CPU = torch.device("cpu")


def write_source(folder: Path, lengths: list[int]) -> Path:
    rng = np.random.default_rng(3)
    for number, length in enumerate(lengths):
        path = folder / "a" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, rng.integers(0, 256, (length, 48, 64), dtype=np.uint8))
    return folder


def build(source: Path, destination: Path, keep_every: int) -> Path:
    config = BuildConfig("dis", short_side=0, window=WINDOW, keep_every=keep_every)
    build_shards(find_videos(str(source)), Folder(str(destination)), config, LocalExecutor(1), lambda _: None)
    assert verify_shards(Folder(str(destination))).problems == ()
    return destination


@pytest.fixture
def one_window(tmp_path: Path) -> tuple[Path, Path]:
    """A set of all frames and a set of every second frame, of videos with one possible clip each."""
    source = write_source(tmp_path / "source", [WINDOW] * 4)
    return build(source, tmp_path / "all", 1), build(source, tmp_path / "half", 2)


def data(folder: Path, stride: int = 2) -> DataConfig:
    return DataConfig(str(folder), frames=4, stride=stride, crop=28, augment=AugmentConfig())


def batches(folder: Path, stride: int = 2) -> list[TubeletBatch]:
    loader = TubeletLoader(
        data(folder, stride), seed=0, global_batch=2, rank=0, num_ranks=1, grid=(2, 7, 7), device=CPU
    )
    try:
        return list(islice(loader, 3))
    finally:
        loader.close()


def test_the_playing_time_is_that_of_the_videos(one_window: tuple[Path, Path]) -> None:
    for folder in one_window:
        assert ShardSet(str(folder)).manifest.num_seconds == pytest.approx(4 * WINDOW / FPS, abs=0.01)


def test_an_inspection_counts_stored_frames(one_window: tuple[Path, Path]) -> None:
    windows = [inspect_video(ShardSet(str(folder)), 0, seed=0).window for folder in one_window]
    assert windows == [WINDOW, WINDOW // 2]


@pytest.mark.parametrize("length", [16, 17, 22])
@pytest.mark.parametrize("keep_every", [2, 4])
def test_stored_frames_equal_those_of_a_set_of_all_frames(tmp_path: Path, length: int, keep_every: int) -> None:
    root = write_source(tmp_path, [length])
    configs = (BuildConfig("dis", short_side=0, window=WINDOW, keep_every=k) for k in (keep_every, 1))
    kept, whole = (VideoProcessor(root, ("a",), config)(Source("a/0.mp4", 0)) for config in configs)
    assert isinstance(kept, Sample)
    assert isinstance(whole, Sample)
    num_stored = length // keep_every
    assert kept.frames == whole.frames[::keep_every][:num_stored]
    assert kept.flow == whole.flow[::keep_every][:num_stored]
    assert np.array_equal(kept.motion, whole.motion[::keep_every][:num_stored])
    assert np.array_equal(kept.scores, whole.scores[::keep_every])
    assert len(kept.scores) == num_stored - WINDOW // keep_every + 1
    assert (kept.info["frames"], kept.info["fps"], kept.info["keep_every"]) == (
        num_stored,
        FPS / keep_every,
        keep_every,
    )


def test_both_sets_give_the_same_batches(one_window: tuple[Path, Path]) -> None:
    for whole, half in zip(*(batches(folder) for folder in one_window), strict=True):
        assert torch.equal(whole.views, half.views)
        assert torch.equal(whole.motion, half.motion)
        assert torch.equal(whole.order, half.order)


def test_both_sets_give_the_same_probe_clips(one_window: tuple[Path, Path]) -> None:
    whole, half = (
        next(iter(ProbeClips(ShardSet(str(folder)), ClipGeometry(4, 2, 28), device=CPU, num_clips=2)))
        for folder in one_window
    )
    assert torch.equal(whole.clips, half.clips)


def test_clips_of_longer_videos_use_only_stored_frames(tmp_path: Path) -> None:
    folder = build(write_source(tmp_path / "source", [33, 19, 16, 40]), tmp_path / "half", 2)
    assert ShardSet(str(folder)).num_frames.tolist().count(16) == 1
    for batch in batches(folder):
        assert batch.views.shape[:3] == (2, 4, 4)


def test_a_stride_whose_frames_are_not_all_stored_is_refused(one_window: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\.stride: found 3, must be a multiple of 2"):
        batches(one_window[1], stride=3)
    with pytest.raises(ConfigError, match=r"clips\.stride: found 3, must be a multiple of 2"):
        ProbeClips(ShardSet(str(one_window[1])), ClipGeometry(4, 3, 28), device=CPU)


def test_the_error_about_another_window_counts_frames_of_the_video(one_window: tuple[Path, Path]) -> None:
    loader = TubeletLoader(
        DataConfig(str(one_window[1]), frames=2, stride=2, crop=28, augment=AugmentConfig()),
        seed=0,
        global_batch=2,
        rank=0,
        num_ranks=1,
        grid=(2, 7, 7),
        device=CPU,
    )
    try:
        with pytest.raises(UserError, match=r"windows of 8 frames, .* is 4; build the set with .* --window 4"):
            next(iter(loader))
    finally:
        loader.close()


def test_keep_every_must_divide_the_window() -> None:
    with pytest.raises(ConfigError, match="keep_every: found 3, must divide the window, 8 frames"):
        BuildConfig("dis", window=WINDOW, keep_every=3)


def test_the_set_records_keep_every(one_window: tuple[Path, Path]) -> None:
    manifest = json.loads((one_window[1] / "manifest.json").read_bytes())
    assert manifest["build"]["keep_every"] == 2
    assert ShardSet(str(one_window[1])).keep_every == 2
    maps = ShardSet(str(one_window[1])).read(0).frame_maps
    assert maps.shape == (WINDOW // 2, 7, 7)

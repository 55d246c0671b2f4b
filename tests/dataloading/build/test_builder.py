from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dataloading.build.builder import build_shards, find_complete_set
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.verify import verify_shards
from dataloading.build.video_processor import VideoResult, sample_key
from dataloading.shards.format import REPORT, Manifest, RefusedVideo, ShardWriter, read_complete_manifest
from dataloading.shards.index import KEY, MEMBERS
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import Source, find_videos
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

CONFIG = BuildConfig(flow="dis", short_side=0, window=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of two good videos each, a video that is too short and a file that is no video."""
    rng = np.random.default_rng(5)
    for name, num_frames in (("a/1", 12), ("a/2", 9), ("b/3", 8), ("b/4", 14), ("b/short", 7)):
        path = tmp_path / "source" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, rng.integers(0, 256, (num_frames, 48, 64), dtype=np.uint8))
    (tmp_path / "source" / "b" / "broken.mp4").write_bytes(b"no video")
    return tmp_path / "source"


def build(source: Path, destination: Path | str, workers: int = 1, config: BuildConfig = CONFIG) -> Manifest:
    return build_shards(
        find_videos(str(source)), Folder(str(destination)), config, LocalExecutor(workers), lambda _: None
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files except the report, which contains times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != REPORT}


def test_a_built_set_is_complete_and_lists_the_refused_videos(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path / "set")
    folder = Folder(str(tmp_path / "set"))
    assert read_complete_manifest(folder) == manifest
    assert verify_shards(folder).problems == ()
    assert (manifest.num_videos, manifest.num_frames, manifest.classes) == (4, 43, ("a", "b"))
    reasons = {video.source: video.reason.partition(":")[0] for video in manifest.refused}
    assert reasons == {"b/short.mp4": "too short", "b/broken.mp4": "unreadable"}


# webdataset does not close its file
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
def test_webdataset_alone_can_read_a_built_set(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path / "set")
    urls = [str(tmp_path / "set" / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == manifest.num_videos
    for sample in samples:
        info = json.loads(sample["json"])
        assert set(MEMBERS) < set(sample)
        assert np.load(io.BytesIO(sample["motion.npy"])).shape == (info["frames"], 7, 7)
        assert np.load(io.BytesIO(sample["scores.npy"])).shape == (info["frames"] - 7,)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_workers(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "one", workers=1)
    build(source, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_seed_decides_the_order(source: Path, tmp_path: Path) -> None:
    order: dict[int, list[str]] = {}
    for seed in (0, 1):
        order[seed] = []

        def listen(result: VideoResult, sources: list[str] = order[seed]) -> None:
            sources.append(result.source if isinstance(result, RefusedVideo) else result.info["source"])

        config = BuildConfig(flow="dis", short_side=0, window=8, seed=seed)
        build_shards(find_videos(str(source)), Folder(str(tmp_path / str(seed))), config, LocalExecutor(1), listen)
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] != order[1]


def test_a_full_shard_is_closed_and_the_next_one_started(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataloading.build.builder.MEGABYTE", 60_000)
    manifest = build(source, tmp_path / "set", config=BuildConfig("dis", short_side=0, window=8, shard_megabytes=1))
    assert len(manifest.shards) > 1
    assert all(shard.bytes > 60_000 for shard in manifest.shards[:-1])
    assert verify_shards(Folder(str(tmp_path / "set"))).problems == ()


def test_the_build_report_has_counts_and_times(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path / "set")
    report = json.loads((tmp_path / "set" / REPORT).read_bytes())
    assert (report["videos"], report["frames"], report["workers"]) == (4, 43, 1)
    assert report["refused"] == {"too short": 1, "unreadable": 1}
    assert manifest.num_seconds == pytest.approx(43 / 25, abs=0.01)  # synthetic videos play at 25 frames a second
    assert report["seconds"] > 0


def test_the_destination_may_be_any_fsspec_url(source: Path) -> None:
    manifest = build(source, "memory://build/set")
    assert read_complete_manifest(Folder("memory://build/set")) == manifest


def test_the_manifest_contains_no_local_path(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path / "set")
    assert str(tmp_path) not in manifest.to_json().decode()


def test_a_source_without_a_usable_video_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="none of its 1 videos can be used; nothing was written"):
        build(tmp_path / "source", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_or_empty_source_is_refused(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=r"source: (no such file|no videos)"):
        find_videos(str(tmp_path / "source"))


def test_a_complete_set_is_found_again(source: Path, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "set"))
    assert find_complete_set(folder, find_videos(str(source)), CONFIG) is None
    manifest = build(source, tmp_path / "set")
    assert find_complete_set(folder, find_videos(str(source)), CONFIG) == manifest


def test_a_set_with_another_configuration_is_refused(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "set")
    with pytest.raises(UserError, match="built with another seed; name another folder"):
        find_complete_set(Folder(str(tmp_path / "set")), find_videos(str(source)), BuildConfig("dis", 9, 0, 8))


def test_a_set_of_other_videos_is_refused(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "set")
    (source / "a" / "1.mp4").unlink()
    with pytest.raises(UserError, match="built with another sources"):
        find_complete_set(Folder(str(tmp_path / "set")), find_videos(str(source)), CONFIG)


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("webdataset.TarWriter.write", full)
    with pytest.raises(UserError, match=r"shard-000000\.tar: no space left"):
        build(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_an_interrupted_build_leaves_nothing_half_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add

    def interrupted(writer: ShardWriter, sample: Any) -> None:
        if writer.num_samples == 1:
            raise KeyboardInterrupt
        add(writer, sample)

    monkeypatch.setattr(ShardWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_shards_of_an_earlier_unfinished_build_are_removed(source: Path, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "set"))
    for name in ("shard-000009.tar", "shard-000009.index.npz"):
        folder.write(name, b"leftover")
    build(source, tmp_path / "set")
    assert verify_shards(folder).problems == ()


def test_keys_are_safe_names_and_differ_by_folder() -> None:
    keys = {sample_key(Source(path, 0)) for path in ("a/v 1.é.mp4", "b/v 1.é.mp4", "a/v 1.é.avi")}
    assert len(keys) == 3
    assert all(KEY.fullmatch(key) for key in keys)


def test_real_clips_of_one_window_are_stored_and_shorter_ones_are_refused(real_videos: Path, tmp_path: Path) -> None:
    for name in ("cleaning_pool/k400_cleaning_pool_short_32_frames.mp4", "formats/h265_video.mp4"):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True)
        target.symlink_to(real_videos / name)
    manifest = build(tmp_path / "source", tmp_path / "set", config=BuildConfig("dis"))
    assert [(shard.samples, shard.frames) for shard in manifest.shards] == [(1, 32)]
    assert manifest.refused[0].reason.startswith("too short: 10 frames, a window has 32")

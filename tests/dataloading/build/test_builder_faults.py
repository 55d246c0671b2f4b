"""Builds whose destination or source fails: one line tells it, no finished shard is lost, the same command goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dataloading.build.build_lock import LEASE
from dataloading.build.builder import build_shards
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.video_processor import BuildConfig, VideoOutcome
from dataloading.shards.format import REPORT
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import scan_sources
from launch.cli.main import main
from mcl_dist.errors import EXIT_FAILURE, UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.s3 import S3Store

OPTIONS = ("--flow", "dis", "--short-side", "0", "--window", "8", "--shard-megabytes", "1", "--workers", "1")
CONFIG = BuildConfig(flow="dis", short_side=0, window=8, shard_megabytes=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of noise, which make a shard of a megabyte each."""
    folder = tmp_path_factory.mktemp("videos") / "a"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(4):
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (50, 128, 160), dtype=np.uint8))
    return folder.parent


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of the set when nothing fails."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert build(source, folder) == 0
    return contents(folder)


def build(source: Path | str, destination: Path | str, *more: str) -> int:
    return main(["shards", "build", str(source), str(destination), *OPTIONS, *more])


def contents(folder: Path | str) -> dict[str, bytes]:
    there = Folder(str(folder))
    return {name: there.read(name) for name in there.names() if name != REPORT}


def after(number: int, do: Callable[[], None]) -> Callable[[object], None]:
    """A listener that does something once so many videos are told."""
    left = [number]

    def listen(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            do()

    return listen


@contextmanager
def proxied(store: S3Store, monkeypatch: pytest.MonkeyPatch, share: float, kinds: set[str]) -> Iterator[FaultProxy]:
    """Let S3 clients reach the store through a proxy that breaks a share of the requests."""
    from s3fs import S3FileSystem

    with fault_proxy(store.endpoint, share=share, kinds=kinds) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_gets_the_same_set_and_each_retry_is_counted(
    source: Path,
    whole: dict[str, bytes],
    s3_url: str,
    s3_store: S3Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with proxied(s3_store, monkeypatch, 0.15, {"503", "reset", "stall", "short"}) as proxy:
        assert build(source, s3_url, "--request-seconds", "1", "--json") == 0
        retries = json.loads(capsys.readouterr().out)["retries"]
        assert retries["server_error"] == proxy.injected["503"]
        assert sum(retries.values()) >= sum(proxy.injected.values()) > 5
    assert contents(s3_url) == whole
    noted = json.loads(Folder(s3_url).read(REPORT))["retries"]
    assert all(noted[reason] <= retries[reason] for reason in noted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["503", "stall"])
def test_a_store_that_is_gone_midway_is_one_line_and_the_build_goes_on_later(
    source: Path, whole: dict[str, bytes], s3_url: str, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("dataloading.build.build_lock.REFRESH_SECONDS", 1.0)
    told: list[str] = []
    with proxied(s3_store, monkeypatch, 0.0, {kind}) as proxy:
        destination = Folder(s3_url, RetryPolicy(seconds=2, request_seconds=0.5, tell=told.append))
        goes = after(3, lambda: setattr(proxy, "share", 1.0))
        with pytest.raises(UserError, match=r"; given up after \d+ tries in \d s; see that the store and ") as raised:
            build_shards(scan_sources(str(source)), destination, CONFIG, LocalExecutor(1), goes)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith(s3_url)
        assert any("; trying again, for " in line for line in told)
        proxy.share = 0.0
        kept = [name for name in destination.names() if name.endswith(".done.json")]
        assert len(kept) == 2
        monkeypatch.setattr(
            "dataloading.build.build_lock.STALE_SECONDS", 0.0
        )  # the lease could not be given back: it runs out
        build_shards(scan_sources(str(source)), destination, CONFIG, LocalExecutor(1), lambda _: None)
    assert contents(s3_url) == whole


@pytest.mark.slow
def test_videos_in_a_store_that_fails_now_and_then_make_the_same_set(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    s3_url: str,
    s3_store: S3Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    videos = Folder(s3_url)
    for file in (source / "a").iterdir():
        videos.put(file, f"a/{file.name}")
    with proxied(s3_store, monkeypatch, 0.3, {"503", "reset", "stall", "short"}) as proxy:
        assert build(s3_url, tmp_path / "set", "--request-seconds", "1", "--json") == 0
        assert sum(proxy.injected.values())
        assert sum(json.loads(capsys.readouterr().out)["retries"].values())
        proxy.share, proxy.kinds = 1.0, frozenset({"stall"})
        proxy.applies = lambda method, path: method == "GET" and path.endswith(".mp4")
        patience = ("--request-seconds", "0.5", "--retry-seconds", "1")
        assert build(s3_url, tmp_path / "other", *patience) == EXIT_FAILURE
    assert "; given up after " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other").exists()
    assert contents(tmp_path / "set") == whole


def test_a_lease_whose_taking_was_answered_by_a_reset_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://faults/lease", RetryPolicy(tell=lambda _: None))
    write = type(folder._filesystem).pipe_file

    def reset_once(*arguments: object, **how: object) -> None:
        write(*arguments, **how)
        if not folder.patience.failures:
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(type(folder._filesystem), "pipe_file", reset_once)
    assert folder.create(LEASE, b"mine")
    assert folder.patience.failures == {"reset": 1}
    assert not folder.create(LEASE, b"another's")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[..., None]]:
    """A disk of that size mounted at `folder`; what is yielded mounts it anew with other options."""
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={megabytes}m", *options)), "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    mount()
    try:
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_midway_is_one_line_and_the_build_goes_on_once_there_is_room(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=4) as remount:
        destination = tmp_path / "disk" / "set"
        assert build(source, destination) == EXIT_FAILURE
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith("no space left; free some, then run the same command again")
        names = {path.name for path in destination.iterdir()}
        assert "shard-000000.done.json" in names
        assert "manifest.json" not in names
        assert not [name for name in names if name.startswith(".")]
        remount("size=64m")
        assert build(source, destination) == 0
        assert "going on after" in capsys.readouterr().err
        assert contents(destination) == whole


def test_a_destination_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", megabytes=4) as remount:
        remount("ro")
        assert build(source, tmp_path / "disk" / "set") == EXIT_FAILURE
        assert "Read-only file system; name a folder that can be written to" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert build(source, tmp_path / "file") == EXIT_FAILURE
    assert build(source, tmp_path / "file" / "set") == EXIT_FAILURE
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_destination_that_vanishes_is_one_line_and_the_next_build_is_whole(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    destination = tmp_path / "set"
    vanishes = after(2, lambda: shutil.rmtree(destination))
    with pytest.raises(UserError, match=f"^{destination}") as raised:
        build_shards(scan_sources(str(source)), Folder(str(destination)), CONFIG, LocalExecutor(1), vanishes)
    assert "\n" not in str(raised.value)
    assert not (destination / "manifest.json").exists()
    assert build(source, destination) == 0
    assert contents(destination) == whole


def test_no_manifest_is_written_of_shards_that_are_gone(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "set"
    removes = after(4, lambda: (destination / "shard-000001.tar").unlink())
    with pytest.raises(UserError, match=r"shard-000001.tar: gone since it was written; run the same command again$"):
        build_shards(scan_sources(str(source)), Folder(str(destination)), CONFIG, LocalExecutor(1), removes)
    assert not (destination / "manifest.json").exists()


def test_a_source_that_vanishes_midway_is_refused_video_by_video(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "videos"
    shutil.copytree(source, copy)
    told: list[VideoOutcome] = []
    vanishes = after(2, lambda: shutil.rmtree(copy))

    def listen(outcome: VideoOutcome) -> None:
        told.append(outcome)
        vanishes(outcome)

    manifest = build_shards(scan_sources(str(copy)), Folder(str(tmp_path / "set")), CONFIG, LocalExecutor(1), listen)
    assert manifest.num_videos == 2
    assert [video.reason.partition(":")[0] for video in manifest.refused] == ["missing", "missing"]

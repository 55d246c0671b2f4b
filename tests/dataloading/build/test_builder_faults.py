"""Builds with a failing destination or source: the error is one line, and the same command resumes the build."""

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
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.shards.format import REPORT
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import find_videos
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
    """Four videos of noise; each fills a shard of one megabyte."""
    folder = tmp_path_factory.mktemp("videos") / "a"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(4):
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (50, 128, 160), dtype=np.uint8))
    return folder.parent


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of the set built without failures."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert build(source, folder) == 0
    return contents(folder)


def build(source: Path | str, destination: Path | str, *more: str) -> int:
    return main(["shards", "build", str(source), str(destination), *OPTIONS, *more])


def contents(folder: Path | str) -> dict[str, bytes]:
    stored = Folder(str(folder))
    return {name: stored.read(name) for name in stored.names() if name != REPORT}


def after(number: int, do: Callable[[], None]) -> Callable[[object], None]:
    """A listener that calls `do` at its n-th event."""
    left = [number]

    def listen(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            do()

    return listen


@contextmanager
def proxied(store: S3Store, monkeypatch: pytest.MonkeyPatch, share: float, kinds: set[str]) -> Iterator[FaultProxy]:
    """Route S3 clients through a proxy that breaks a share of the requests."""
    from s3fs import S3FileSystem

    with fault_proxy(store.endpoint, share=share, kinds=kinds) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_flaky_destination_gets_the_same_set_and_every_retry_is_counted(
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
    reported = json.loads(Folder(s3_url).read(REPORT))["retries"]
    assert all(reported[reason] <= retries[reason] for reason in reported)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["503", "stall"])
def test_a_store_that_goes_away_is_an_error_of_one_line_and_the_build_resumes_later(
    source: Path, whole: dict[str, bytes], s3_url: str, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("dataloading.build.build_lock.REFRESH_SECONDS", 1.0)
    warnings: list[str] = []
    with proxied(s3_store, monkeypatch, 0.0, {kind}) as proxy:
        destination = Folder(s3_url, RetryPolicy(seconds=2, request_seconds=0.5, warn=warnings.append))
        fail = after(3, lambda: setattr(proxy, "share", 1.0))
        with pytest.raises(UserError, match=r"; given up after \d+ tries in \d s; check the store and ") as raised:
            build_shards(find_videos(str(source)), destination, CONFIG, LocalExecutor(1), fail)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith(s3_url)
        assert any("; retrying for up to " in line for line in warnings)
        proxy.share = 0.0
        kept = [name for name in destination.names() if name.endswith(".done.json")]
        assert len(kept) == 2
        # The lease could not be released: let it expire.
        monkeypatch.setattr("dataloading.build.build_lock.STALE_SECONDS", 0.0)
        build_shards(find_videos(str(source)), destination, CONFIG, LocalExecutor(1), lambda _: None)
    assert contents(s3_url) == whole


@pytest.mark.slow
def test_videos_in_a_flaky_store_make_the_same_set(
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
        retry = ("--request-seconds", "0.5", "--retry-seconds", "1")
        assert build(s3_url, tmp_path / "other", *retry) == EXIT_FAILURE
    assert "; given up after " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "other").exists()
    assert contents(tmp_path / "set") == whole


def test_a_lease_whose_creation_was_answered_by_a_reset_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://faults/lease", RetryPolicy(warn=lambda _: None))
    write = type(folder.filesystem).pipe_file

    def reset_once(*arguments: object, **how: object) -> None:
        write(*arguments, **how)
        if not folder.retry.failures:
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(type(folder.filesystem), "pipe_file", reset_once)
    assert folder.create(LEASE, b"mine")
    assert folder.retry.failures == {"reset": 1}
    assert not folder.create(LEASE, b"another's")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[..., None]]:
    """Mount a disk of that size at `folder`; the yielded function remounts it with other options."""
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={megabytes}m", *options)), "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a disk: {done.stderr.strip()}")

    mount()
    try:
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_one_line_and_the_build_resumes_once_space_is_free(
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
        assert "resuming after" in capsys.readouterr().err
        assert contents(destination) == whole


def test_an_unwritable_destination_is_an_error_of_one_line(
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


@pytest.mark.slow
def test_a_removed_destination_is_an_error_of_one_line_and_the_next_build_is_complete(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    destination = tmp_path / "set"
    remove = after(2, lambda: shutil.rmtree(destination))
    with pytest.raises(UserError, match=f"^{destination}") as raised:
        build_shards(find_videos(str(source)), Folder(str(destination)), CONFIG, LocalExecutor(1), remove)
    assert "\n" not in str(raised.value)
    assert not (destination / "manifest.json").exists()
    assert build(source, destination) == 0
    assert contents(destination) == whole


@pytest.mark.slow
def test_no_manifest_is_written_for_removed_shards(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "set"
    remove = after(4, lambda: (destination / "shard-000001.tar").unlink())
    with pytest.raises(UserError, match=r"shard-000001.tar: missing after it was written; run the same command again$"):
        build_shards(find_videos(str(source)), Folder(str(destination)), CONFIG, LocalExecutor(1), remove)
    assert not (destination / "manifest.json").exists()


def test_videos_removed_during_the_build_are_refused(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "videos"
    shutil.copytree(source, copy)
    remove = after(2, lambda: shutil.rmtree(copy))
    manifest = build_shards(find_videos(str(copy)), Folder(str(tmp_path / "set")), CONFIG, LocalExecutor(1), remove)
    assert manifest.num_videos == 2
    assert [video.reason.partition(":")[0] for video in manifest.refused] == ["missing", "missing"]

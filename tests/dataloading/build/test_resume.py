"""Builds interrupted at any moment, and two builders at one destination."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dataloading.build import build_lock
from dataloading.build.build_lock import LEASE, hold_build_lock
from dataloading.build.builder import ResumedBuild, build_shards, remove_leftovers
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.verify import verify_shards
from dataloading.build.video_processor import VideoProcessor, VideoResult
from dataloading.shards.format import REPORT, Manifest, RefusedVideo
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import find_videos
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

CONFIG = BuildConfig(flow="dis", short_side=0, window=8, shard_megabytes=1)
SHARD_BYTES = 60_000  # a "megabyte" in these tests: two videos per shard
BUILDER = f"""
import sys
from dataloading.build import builder
from dataloading.build.config import BuildConfig
from dataloading.videos.sources import find_videos
from dataloading.build.local_executor import LocalExecutor
from mcl_dist.storage.folder import Folder

def listen(event):
    print(event.source if hasattr(event, "source") else type(event).__name__, flush=True)

if __name__ == "__main__":
    builder.MEGABYTE = {SHARD_BYTES}
    config = BuildConfig(sys.argv[4], short_side=0, window=8, shard_megabytes=1)
    builder.build_shards(find_videos(sys.argv[1]), Folder(sys.argv[2]), config, LocalExecutor(int(sys.argv[3])), listen)
"""


class Killed(BaseException):
    """Stands for the end of the process: no handler of our errors catches it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good videos, and four that are too short."""
    folder = tmp_path_factory.mktemp("resume") / "source" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for number in range(12):
        num_frames = 7 if number % 3 == 2 else 10 + number
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (num_frames, 48, 64), dtype=np.uint8))
    return folder.parent


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataloading.build.builder.MEGABYTE", SHARD_BYTES)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of the set built without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataloading.build.builder.MEGABYTE", SHARD_BYTES)
        build(source, folder)
    return contents(folder)


def build(
    source: Path,
    destination: Path | str,
    config: BuildConfig = CONFIG,
    listen: Callable[[VideoResult | ResumedBuild], None] = lambda _: None,
) -> Manifest:
    return build_shards(find_videos(str(source)), Folder(str(destination)), config, LocalExecutor(1), listen)


def contents(folder: Path | str) -> dict[str, bytes]:
    stored = Folder(str(folder))
    return {name: stored.read(name) for name in stored.names() if name != REPORT}


def stop_at(number: int, error: type[BaseException] = Killed) -> Callable[[VideoResult | ResumedBuild], None]:
    """A listener that ends the build at its n-th event."""
    left = [number]

    def listen(_: VideoResult | ResumedBuild) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    return listen


def start(source: Path, destination: Path | str, workers: int = 1, flow: str = "dis") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(source), str(destination), str(workers), flow]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], number: int) -> None:
    os.kill(process.pid, number)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("url", ["{}/set", "memory://resume/{}"])
@pytest.mark.parametrize("number", [0, 1, 5, 8, 11])
def test_a_resumed_build_makes_the_same_set_and_repeats_no_finished_shard(
    source: Path, tmp_path: Path, whole: dict[str, bytes], url: str, number: int
) -> None:
    destination = url.format(tmp_path)
    with pytest.raises(Killed):
        build(source, destination, listen=stop_at(number))
    events: list[VideoResult | ResumedBuild] = []
    build(source, destination, listen=events.append)
    assert contents(destination) == whole
    kept = events[0].num_videos + events[0].num_refused if isinstance(events[0], ResumedBuild) else 0
    assert (kept > 0) == (number > 4)
    assert kept + sum(not isinstance(event, ResumedBuild) for event in events) == 12


def test_a_build_interrupted_many_times_makes_the_same_set(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for _ in range(12):
        # Each run finishes one more shard and starts the next.
        with suppress(Killed):
            build(source, tmp_path / "set", listen=stop_at(8))
    assert contents(tmp_path / "set") == whole


def test_refused_videos_of_finished_shards_are_not_opened_again(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "set", listen=stop_at(11))
    opened = []
    call = VideoProcessor.__call__

    def record(processor: VideoProcessor, video: Any, *retry: Any) -> VideoResult:
        opened.append(video.path)
        return call(processor, video, *retry)

    monkeypatch.setattr(VideoProcessor, "__call__", record)
    manifest = build(source, tmp_path / "set")
    assert 0 < len(opened) < 6
    assert len(manifest.refused) == 4
    assert contents(tmp_path / "set") == whole


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 11, 12, 13, 14, 17])
def test_a_kill_during_any_write_leaves_nothing_half_written(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    """The process ends at the n-th write to the destination (shard, index, journal, report, manifest, removal)."""
    destination = tmp_path / "set"
    with monkeypatch.context() as patch:
        end_at_write(patch, number, when)
        with suppress(Killed):
            build(source, destination)
    visible = {path.name: path.read_bytes() for path in destination.iterdir() if path.name in whole}
    assert all(whole[name] == data for name, data in visible.items())
    build(source, destination)
    remove_leftovers(Folder(str(destination)))
    assert contents(destination) == whole


def end_at_write(patch: pytest.MonkeyPatch, number: int, when: str) -> None:
    """Let the process "end" at the n-th `Folder.write`, `put` or `remove`, without any clean-up afterwards."""
    left = [number]

    def ending(method: Callable[..., None]) -> Callable[..., None]:
        def call(folder: Folder, *arguments: Any) -> None:
            left[0] -= 1
            if left[0] >= 0:
                method(folder, *arguments)
            if left[0] < 0:
                if when == "after" and left[0] == -1:
                    method(folder, *arguments)
                if when == "half" and left[0] == -1:
                    name = str(arguments[-1] if isinstance(arguments[0], Path) else arguments[0])
                    Path(folder.path(f".{name}.123.partial")).write_bytes(b"half")
                raise Killed

        return call

    for name in ("write", "put", "remove"):
        patch.setattr(Folder, name, ending(getattr(Folder, name)))
    patch.setattr(build_lock.shutil, "rmtree", lambda *_a, **_k: None)


@pytest.mark.parametrize(
    ("change", "what"), [({"quality": 50}, "quality"), ({"seed": 1}, "seed"), ({"window": 9}, "window")]
)
def test_another_configuration_than_that_of_an_unfinished_build_is_refused(
    source: Path, tmp_path: Path, change: dict[str, int], what: str
) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "set", listen=stop_at(8))
    before = contents(tmp_path / "set")
    options = {"flow": "dis", "short_side": 0, "window": 8, "shard_megabytes": 1, **change}
    with pytest.raises(UserError, match=f"holds an unfinished build with another {what}; name another folder"):
        build(source, tmp_path / "set", BuildConfig(**options))
    assert contents(tmp_path / "set") == before


def test_other_videos_than_those_of_an_unfinished_build_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "set", listen=stop_at(8))
    (tmp_path / "other" / "a").mkdir(parents=True)
    write_video(tmp_path / "other" / "a" / "1.mp4", np.zeros((9, 48, 64), np.uint8))
    with pytest.raises(UserError, match="an unfinished build with another sources"):
        build(tmp_path / "other", tmp_path / "set")


def test_a_journal_has_the_fields_of_earlier_versions(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "set", listen=stop_at(8))
    journal = json.loads((tmp_path / "set" / "shard-000000.done.json").read_bytes())
    assert list(journal) == ["build", "entry", "refused", "taken", "looks"]


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.npz", "shard-000001.done.json"])
def test_a_damaged_finished_shard_is_built_again(
    source: Path, tmp_path: Path, whole: dict[str, bytes], name: str
) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "set", listen=stop_at(11))
    (tmp_path / "set" / name).write_bytes(b"damaged")
    build(source, tmp_path / "set")
    assert contents(tmp_path / "set") == whole


@pytest.mark.slow
def test_a_build_killed_twenty_times_at_random_makes_the_same_set(source: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, flow="tvl1")
    build(source, tmp_path / "whole", config)
    draw = random.Random(3)
    destination = tmp_path / "set"
    num_killed = 0
    while num_killed < 20:
        process = start(source, destination, workers=1 + num_killed % 2, flow="tvl1")
        assert process.stdout is not None
        # Wait for the first result: the kill must hit the build, not its imports.
        select.select([process.stdout], [], [], 30)
        time.sleep(draw.uniform(0, 0.25))
        if process.poll() is None:
            num_killed += 1
        end(process, signal.SIGKILL) if process.poll() is None else process.communicate()
        if (destination / "manifest.json").exists():
            assert verify_shards(Folder(str(destination))).videos == 8
            for path in destination.iterdir():
                if path.is_file() and draw.random() < 0.9:
                    path.unlink()  # start again: one build is too short for twenty kills
    build(source, destination, config)
    remove_leftovers(Folder(str(destination)))
    assert contents(destination) == contents(tmp_path / "whole")


def test_a_second_builder_of_a_local_folder_is_refused_while_the_first_lives(source: Path, tmp_path: Path) -> None:
    with hold_build_lock(Folder(str(tmp_path / "set"))), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        build(source, tmp_path / "set")
    build(source, tmp_path / "set")


@pytest.mark.slow
def test_a_killed_builder_releases_its_lock(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    process = start(source, tmp_path / "set", workers=2)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UserError, match=rf"another build is writing there \(process {process.pid} on"):
        build(source, tmp_path / "set")
    end(process, signal.SIGKILL)
    build(source, tmp_path / "set")
    assert contents(tmp_path / "set") == whole


def test_a_second_builder_of_a_remote_set_is_refused(source: Path) -> None:
    url = "memory://leases/two"
    with hold_build_lock(Folder(url)), pytest.raises(UserError, match="another build is writing there"):
        build(source, url)
    assert LEASE not in contents(url)


def write_lease(url: str, **changes: Any) -> None:
    """Let another builder hold the lease."""
    lease = {"host": "elsewhere", "pid": 1, "id": "other", "time": time.time(), **changes}
    with fsspec.open(f"{url}/{LEASE}", "wb") as file:
        file.write(json.dumps(lease).encode())


def test_an_expired_lease_is_taken_over_and_reported(source: Path, whole: dict[str, bytes]) -> None:
    url = "memory://leases/stale"
    write_lease(url, time=time.time() - build_lock.STALE_SECONDS - 1)
    events: list[VideoResult | ResumedBuild] = []
    build(source, url, listen=events.append)
    assert events[0] == ResumedBuild("process 1 on elsewhere", 0, 0, 0)
    assert contents(url) == whole


def test_a_fresh_lease_of_another_host_is_respected(source: Path) -> None:
    write_lease("memory://leases/fresh")
    with pytest.raises(UserError, match=r"another build is writing there \(process 1 on elsewhere\)"):
        build(source, "memory://leases/fresh")


def test_the_lease_of_an_ended_process_of_this_host_is_taken_over_at_once(source: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    url = "memory://leases/gone"
    write_lease(url, host=build_lock.socket.gethostname(), pid=process.pid)
    events: list[VideoResult | ResumedBuild] = []
    build(source, url, listen=events.append)
    assert isinstance(events[0], ResumedBuild)


def test_a_builder_that_lost_its_lease_stops_writing(source: Path) -> None:
    url = "memory://leases/lost"

    def lose(result: VideoResult | ResumedBuild) -> None:
        if isinstance(result, RefusedVideo):
            write_lease(url)

    with pytest.raises(UserError, match="this build's lease was lost to process 1 on elsewhere"):
        build(source, url, listen=lose)
    assert "manifest.json" not in contents(url)
    assert LEASE in contents(url)


def test_a_lease_is_refreshed_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "REFRESH_SECONDS", 0.01)
    folder = Folder("memory://leases/refreshed")
    with hold_build_lock(folder):
        first = folder.read(LEASE)
        deadline = time.monotonic() + 30
        while folder.read(LEASE) == first:
            assert time.monotonic() < deadline
    assert not folder.exists(LEASE)

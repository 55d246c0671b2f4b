"""Builds to and from a real S3 store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataloading.build.build_lock import LEASE, hold_build_lock
from dataloading.build.duplicates import find_duplicates
from dataloading.build.verify import verify_shards
from dataloading.shards.format import REPORT
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import find_videos
from launch.cli.main import main
from mcl_dist.errors import EXIT_FAILURE, UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy
from tests.support.s3 import SECRET

OPTIONS = ("--flow", "dis", "--short-side", "0", "--window", "8", "--shard-megabytes", "1")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of noise, each of which fills a shard of one megabyte, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos") / "a"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(4):
        write_video(folder / f"{number}.mp4", rng.integers(0, 256, (50, 128, 160), dtype=np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder.parent


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("local")
    assert build(source, str(folder / "set")) == 0
    return contents(str(folder / "set"))


def build(source: Path, url: str) -> int:
    return main(["shards", "build", str(source), url, *OPTIONS, "--workers", "1"])


def contents(url: str) -> dict[str, bytes]:
    stored = Folder(url)
    return {name: stored.read(name) for name in stored.names() if name != REPORT}


def start(source: Path, url: str, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli.main", "shards", "build", str(source), url, *OPTIONS]
    command += ["--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_set_in_a_store_equals_the_local_one_and_is_not_built_twice(
    source: Path, local: dict[str, bytes], s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, s3_url) == 0
    assert contents(s3_url) == local
    assert len([name for name in local if name.endswith(".tar")]) > 1
    assert verify_shards(Folder(s3_url), workers=2).problems == ()
    capsys.readouterr()
    assert build(source, s3_url) == 0
    assert "already complete" in capsys.readouterr().err


def test_videos_in_a_store_make_the_same_set_as_local_ones(
    source: Path, local: dict[str, bytes], s3_url: str, tmp_path: Path
) -> None:
    videos = Folder(f"{s3_url}-of-videos")
    for file in (source / "a").iterdir():
        videos.put(file, f"a/{file.name}")
    arguments = ["shards", "build", videos.url, str(tmp_path / "set"), *OPTIONS, "--workers", "2"]
    assert main(arguments) == 0
    assert contents(str(tmp_path / "set")) == local
    videos.put(source / "a" / "0.mp4", "b/copy.mp4")
    assert find_duplicates(find_videos(videos.url)) == {"b/copy.mp4": "a/0.mp4"}


def test_a_build_to_a_store_resumes_after_a_kill(
    source: Path, local: dict[str, bytes], s3_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(source, s3_url, workers=2)
    folder = Folder(s3_url)
    while not folder.exists("shard-000000.done.json"):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not folder.exists("manifest.json")
    assert build(source, s3_url) == 0
    output = capsys.readouterr().err
    assert f"took over the lease of an earlier build (process {process.pid} on " in output
    assert "resuming after " in output
    assert contents(s3_url) == local


def test_a_second_builder_to_a_store_is_refused(source: Path, s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_build_lock(Folder(s3_url)):
        assert build(source, s3_url) == EXIT_FAILURE
        assert Folder(s3_url).names() == [LEASE]
    assert "another build is writing there" in capsys.readouterr().err.splitlines()[-1]


def test_only_one_of_two_builders_can_create_the_lease(s3_url: str) -> None:
    folder = Folder(s3_url)
    assert folder.create(LEASE, b"one")
    assert not folder.create(LEASE, b"two")
    assert folder.read(LEASE) == b"one"


def test_the_secret_is_in_no_output_object_or_process_list(source: Path, s3_url: str) -> None:
    process = start(source, s3_url, workers=2)
    listed = set()
    while process.poll() is None:
        listed |= {read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    outputs = process.communicate()
    assert process.returncode == 0
    assert any(b"multiprocessing" in line for line in listed)
    stored = contents(s3_url)
    assert json.loads(stored["manifest.json"])["totals"]["videos"] == 4
    for text in (*listed, *(output.encode() for output in outputs), *stored.values(), Folder(s3_url).read(REPORT)):
        assert SECRET.encode() not in text


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-5e1ad0c7", "permission denied; check its owner or your credentials"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "Could not connect to the endpoint URL"),
    ],
)
def test_a_store_that_refuses_or_does_not_answer_is_an_error_of_one_line(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=message) as raised:
        Folder(s3_url, RetryPolicy(seconds=0)).read("manifest.json")
    assert "\n" not in str(raised.value)
    assert value == "http://127.0.0.1:9" or value not in str(raised.value)

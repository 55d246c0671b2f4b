"""Builds on a Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dataloading.build.ray_executor import RayExecutor
from dataloading.shards.format import REPORT
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import find_videos
from launch.cli.main import main
from mcl_dist.errors import EXIT_FAILURE, UserError
from mcl_dist.storage.folder import Folder

OPTIONS = ("--flow", "tvl1", "--short-side", "0", "--window", "8", "--shard-megabytes", "1")
pytestmark = pytest.mark.slow
FAST_HEALTH_CHECKS = {  # Ray's defaults take longer to notice a dead node
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(shutdown_at_exit=True)
cluster.add_node(num_cpus=1, include_dashboard=False)
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("killed", flush=True)
cluster.shutdown()
"""


class TwoNodes:
    """A cluster of two nodes with one processor each, in another process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._line()

    def kill_one(self) -> None:
        print(file=self._process.stdin, flush=True)
        assert self._line() == "killed"

    def end(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


@contextmanager
def running_cluster() -> Iterator[TwoNodes]:
    environment = {**os.environ, **FAST_HEALTH_CHECKS, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as process:
        yield TwoNodes(process)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    """A cluster for tests that do not damage it."""
    with running_cluster() as nodes:
        yield nodes


@pytest.fixture
def mortal_nodes() -> Iterator[TwoNodes]:
    """A cluster for one test."""
    with running_cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten good videos, each of which fills a shard of one megabyte, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos") / "a"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(10):
        picture = rng.integers(0, 256, (112, 144), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", np.stack([np.roll(picture, time, axis=1) for time in range(80)]))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder.parent


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The contents of the set as one local process builds it."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    assert main(["shards", "build", str(source), str(folder), *OPTIONS, "--workers", "1"]) == 0
    return contents(folder)


def start(source: Path, destination: Path, address: str) -> subprocess.Popen[str]:
    """Start a build on the cluster and wait for its first finished shard."""
    command = [sys.executable, "-m", "launch.cli.main", "shards", "build", str(source), str(destination), *OPTIONS]
    command += ["--executor", "ray", "--address", address, "--json"]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (destination / "shard-000000.done.json").exists():
        assert build.poll() is None, build.communicate()
    return build


def contents(folder: Path) -> dict[str, bytes]:
    stored = Folder(str(folder))
    return {name: stored.read(name) for name in stored.names() if name != REPORT}


def test_every_executor_builds_the_same_set_even_if_a_node_dies(
    source: Path, whole: dict[str, bytes], tmp_path: Path, mortal_nodes: TwoNodes
) -> None:
    assert main(["shards", "build", str(source), str(tmp_path / "2"), *OPTIONS, "--workers", "2"]) == 0
    with start(source, tmp_path / "ray", mortal_nodes.address) as build:
        mortal_nodes.kill_one()
        out, err = build.communicate(timeout=120)
    assert build.returncode == 0, err
    assert json.loads(out)["videos"] == 10
    assert "of the Ray cluster is gone; other nodes build its videos" in err
    assert contents(tmp_path / "ray") == contents(tmp_path / "2") == whole
    assert json.loads((tmp_path / "ray" / REPORT).read_bytes())["executor"] == "ray"


def test_a_killed_builder_resumes_on_the_same_cluster(
    source: Path, whole: dict[str, bytes], tmp_path: Path, two_nodes: TwoNodes, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(source, tmp_path / "set", two_nodes.address) as build:
        build.kill()
    where = ("--executor", "ray", "--address", two_nodes.address)
    assert main(["shards", "build", str(source), str(tmp_path / "set"), *OPTIONS, *where]) == 0
    assert "resuming after" in capsys.readouterr().err
    assert contents(tmp_path / "set") == whole


def test_a_cluster_that_does_not_answer_is_an_error_of_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--executor", "ray", "--address", "127.0.0.1:9")
    assert main(["shards", "build", str(source), str(tmp_path / "set"), *OPTIONS, *where]) == EXIT_FAILURE
    assert capsys.readouterr().err.startswith("mcl: Ray at 127.0.0.1:9: ")
    assert not (tmp_path / "set").exists()


def test_a_cluster_that_ends_is_an_error_of_one_line(mortal_nodes: TwoNodes) -> None:
    with RayExecutor(mortal_nodes.address).map(time.sleep, [0, 600, 600]) as results:
        next(results)
        mortal_nodes.end()
        with pytest.raises(UserError, match=r"^Ray: ") as raised:
            next(results)
    assert "\n" not in str(raised.value)


def test_an_error_on_a_node_is_raised_unchanged(two_nodes: TwoNodes) -> None:
    with (
        RayExecutor(two_nodes.address).map(find_videos, ["/nowhere"]) as results,
        pytest.raises(UserError, match=r"^/nowhere: no such file or folder; check the path$"),
    ):
        next(results)


def test_a_task_that_kills_its_process_on_every_try_is_given_up(two_nodes: TwoNodes) -> None:
    with (
        RayExecutor(two_nodes.address, max_retries=1).map(os._exit, [3]) as results,
        pytest.raises(UserError, match=r"^3: its node or process died on every try; given up \("),
    ):
        next(results)

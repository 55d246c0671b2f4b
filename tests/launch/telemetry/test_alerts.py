"""Alerts of a real Prometheus: raised by injected faults, resolved when the faults end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import RUNTIME, NodeSpec, launcher_command, launcher_environment
from mcl_dist.distributed.heartbeat import read_beats
from tests.launch.cli.test_pretrain import arguments_for
from tests.support.faultproxy import FaultProxy
from tests.support.paths import REPOSITORY
from tests.support.ports import free_ports
from tests.support.processes import pids_of_run
from tests.support.real_prometheus import Prometheus, until
from tests.support.stores import behind_http

STARTS_WITHIN = 240.0
FIRES_WITHIN = 120.0
RESOLVES_WITHIN = 120.0
SMALL_DISK = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


@dataclass(frozen=True)
class Site:
    """A training of two ranks on a set behind HTTP, and the places where faults are injected.

    Attributes:
        shards: folder of the set behind the store.
        store: fault proxy in front of the store.
        poison: while this file exists, batches of the second rank contain a NaN pixel.
        disk: a small disk for checkpoints.
        ranks: process ids of the ranks.
    """

    prometheus: Prometheus
    shards: Path
    store: FaultProxy
    poison: Path
    disk: Path
    ranks: tuple[int, ...]


@pytest.fixture(scope="module")
def site(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    run, disk, runtime, poison = (folder / name for name in ("run", "disk", "runtime", "poison"))
    disk.mkdir()
    runtime.mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(disk)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace")
    shards = Path(shutil.copytree(synthetic_shards, folder / "served" / "shards"))
    with ExitStack() as stack:
        url, store = stack.enter_context(behind_http(shards, folder / "nginx"))  # skips the tests without nginx
        prometheus = stack.enter_context(closing(Prometheus(folder / "prometheus")))
        settings = [f"monitoring.port={free_ports(2)}", f"monitoring.targets={prometheus.targets}/run.json"]
        settings += ["train.steps=99999", "train.max_nonfinite_steps=99999", "data.max_bad_fraction=1"]
        settings += [f"data.cache={folder}/cache", "data.fetch=ranges"]
        settings += [f"checkpoint.folder={disk}", "checkpoint.every=4", "checkpoint.max_failures=99999"]
        script = str(REPOSITORY / "tests" / "support" / "poisoned_rank.py")
        command = launcher_command(script, arguments_for(url, run, *settings), NodeSpec(2))
        with (folder / "log").open("w") as log:
            training = subprocess.Popen(
                [*mount, *command],
                env=launcher_environment({RUNTIME: str(runtime), "POISON": str(poison)}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        stack.callback(training.wait, 30)
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in pids_of_run(run)])

        def has_checkpoint() -> bool:
            assert training.poll() is None, (folder / "log").read_text()
            return bool(prometheus.series("mcl_checkpoints_written_total > 0"))

        assert until(has_checkpoint, STARTS_WITHIN), (folder / "log").read_text()
        ranks = tuple(beat.pid for beat in sorted(read_beats(runtime), key=lambda beat: beat.rank))
        yield Site(prometheus, shards, store, poison, Path(f"/proc/{training.pid}/root{disk}"), ranks)


@contextmanager
def store_that_answers_503(site: Site) -> Iterator[None]:
    site.store.kinds = frozenset({"503"})
    site.store.share = 0.2
    yield
    site.store.share = 0.0
    assert site.store.injected["503"]


@contextmanager
def corrupted_shard(site: Site) -> Iterator[None]:
    """Overwrite all stills of one video in the store with zeros."""
    path = site.shards / "shard-000000.tar"
    with tarfile.open(path) as tar:
        stills = [member for member in tar if member.name.endswith(".frames.mjpg")][-1]
    with path.open("r+b") as shard:
        shard.seek(stills.offset_data)
        whole = shard.read(stills.size)
        shard.seek(stills.offset_data)
        shard.write(bytes(stills.size))
        shard.flush()
        yield
        shard.seek(stills.offset_data)
        shard.write(whole)


@contextmanager
def nan_pixel(site: Site) -> Iterator[None]:
    site.poison.touch()
    yield
    site.poison.unlink()


@contextmanager
def full_disk(site: Site) -> Iterator[None]:
    """A foreign file takes all free space until the fault ends."""
    filler, ended = site.disk / "filler", threading.Event()

    def fill() -> None:
        with filler.open("ab", buffering=0) as file:
            while not ended.wait(0.05):
                with suppress(OSError):
                    file.write(bytes(2**20))

    filling = threading.Thread(target=fill)
    filling.start()
    yield
    ended.set()
    filling.join()
    filler.unlink()


@contextmanager
def slow_rank(site: Site) -> Iterator[None]:
    """Suspend the second rank for most of the time."""
    ended = threading.Event()

    def hold_up() -> None:
        while not ended.wait(0.02):
            os.kill(site.ranks[1], signal.SIGSTOP)
            ended.wait(0.06)
            os.kill(site.ranks[1], signal.SIGCONT)

    holding = threading.Thread(target=hold_up)
    holding.start()
    yield
    ended.set()
    holding.join()


Fault = Callable[[Site], AbstractContextManager[None]]
# Faults of one element are injected together. Each has its alerts, with the rank that an alert names.
FAULTS: list[dict[Fault, set[tuple[str, str]]]] = [
    {
        store_that_answers_503: {("MclRetryStorm", "")},
        corrupted_shard: {("MclBadSamples", "")},
        nan_pixel: {("MclNonFinite", "")},
        full_disk: {("MclCheckpointFailing", ""), ("MclDiskFilling", "0")},
    },
    {slow_rank: {("MclStraggler", "1")}},
]


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: "-".join(fault.__name__ for fault in faults))
def test_a_fault_raises_its_alert_until_it_ends(site: Site, faults: dict[Fault, set[tuple[str, str]]]) -> None:
    expected = set().union(*faults.values())

    def firing() -> set[tuple[str, str]]:
        return expected & site.prometheus.firing()

    assert not firing()
    with ExitStack() as active:
        for fault in faults:
            active.enter_context(fault(site))
        assert until(lambda: firing() == expected, FIRES_WITHIN), expected - firing()
    assert until(lambda: not firing(), RESOLVES_WITHIN), firing()


def test_a_suspended_rank_raises_an_alert_until_it_continues(site: Site) -> None:
    alert = ("MclRankGone", "1")
    assert alert not in site.prometheus.firing()
    os.kill(site.ranks[1], signal.SIGSTOP)
    try:
        assert until(lambda: alert in site.prometheus.firing(), FIRES_WITHIN)
    finally:
        os.kill(site.ranks[1], signal.SIGCONT)
    assert until(lambda: alert not in site.prometheus.firing(), RESOLVES_WITHIN)

"""Alerts that a real Prometheus raises when something really breaks, and takes back when it is mended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import RUNTIME, NodeSpec, launcher_command, launcher_environment
from mcl_dist.distributed.heartbeat import read_beats
from tests.launch.cli.test_pretrain import words
from tests.support.faultproxy import FaultProxy
from tests.support.paths import REPOSITORY
from tests.support.ports import free_ports
from tests.support.processes import of_run
from tests.support.real_prometheus import Prometheus, until
from tests.support.stores import behind_http

STARTS_WITHIN = 240.0
FIRES_WITHIN = 120.0
GOES_WITHIN = 120.0
SMALL_DISK = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


@dataclass(frozen=True)
class Site:
    """A training of two ranks on a set at http, and all that can break around it.

    Attributes:
        shards: the set where the store keeps it.
        store: in front of it.
        poison: while this file is there, batches of the second rank hold a pixel that is no number.
        disk: a small one for checkpoints.
        ranks: process ids.
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
    prometheus = Prometheus(folder / "prometheus")
    with behind_http(shards, folder / "nginx") as (url, store), ExitStack() as ends:
        ends.callback(prometheus.close)
        settings = [f"monitoring.port={free_ports(2)}", f"monitoring.http.file_sd={prometheus.targets}/run.json"]
        settings += ["train.steps=99999", "train.max_nonfinite_steps=99999", "data.max_bad_fraction=1"]
        settings += [f"data.cache={folder}/cache", "data.fetch=ranges"]
        settings += [f"checkpoint.folder={disk}", "checkpoint.every=4", "checkpoint.max_failures=99999"]
        script = str(REPOSITORY / "tests" / "support" / "poisoned_rank.py")
        command = launcher_command(script, words(url, run, *settings), NodeSpec(2))
        with (folder / "log").open("w") as log:
            training = subprocess.Popen(
                [*mount, *command],
                env=launcher_environment({RUNTIME: str(runtime), "POISON": str(poison)}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        ends.callback(training.wait, 30)
        ends.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in of_run(run)])

        def is_seen() -> bool:
            assert training.poll() is None, (folder / "log").read_text()
            return bool(prometheus.series("mcl_checkpoints_written_total > 0"))

        assert until(is_seen, STARTS_WITHIN), (folder / "log").read_text()
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
    """All stills of one video are zeros, where the store has them."""
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
def pixel_that_is_no_number(site: Site) -> Iterator[None]:
    site.poison.touch()
    yield
    site.poison.unlink()


@contextmanager
def full_disk(site: Site) -> Iterator[None]:
    """By somebody else's file, which takes whatever is free, and becomes free."""
    filler, mended = site.disk / "filler", threading.Event()

    def fill() -> None:
        with filler.open("ab", buffering=0) as file:
            while not mended.wait(0.05):
                with suppress(OSError):
                    file.write(bytes(2**20))

    filling = threading.Thread(target=fill)
    filling.start()
    yield
    mended.set()
    filling.join()
    filler.unlink()


@contextmanager
def slow_rank(site: Site) -> Iterator[None]:
    """The second rank stands still for most of the time."""
    mended = threading.Event()

    def hold_up() -> None:
        while not mended.wait(0.02):
            os.kill(site.ranks[1], signal.SIGSTOP)
            mended.wait(0.06)
            os.kill(site.ranks[1], signal.SIGCONT)

    holding = threading.Thread(target=hold_up)
    holding.start()
    yield
    mended.set()
    holding.join()


Fault = Callable[[Site], AbstractContextManager[None]]
FAULTS: list[dict[Fault, set[tuple[str, str]]]] = [  # at the same time, with the alerts and the ranks that these name
    {
        store_that_answers_503: {("MclRetryStorm", "")},
        corrupted_shard: {("MclBadSamples", "")},
        pixel_that_is_no_number: {("MclNonFinite", "")},
        full_disk: {("MclCheckpointFailing", ""), ("MclDiskFilling", "0")},
    },
    {slow_rank: {("MclStraggler", "1")}},
]


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: "-".join(fault.__name__ for fault in faults))
def test_what_breaks_is_an_alert_until_it_is_mended(site: Site, faults: dict[Fault, set[tuple[str, str]]]) -> None:
    expected = set().union(*faults.values())

    def firing() -> set[tuple[str, str]]:
        return expected & site.prometheus.firing()

    assert not firing()
    with ExitStack() as broken:
        for fault in faults:
            broken.enter_context(fault(site))
        assert until(lambda: firing() == expected, FIRES_WITHIN), expected - firing()
    assert until(lambda: not firing(), GOES_WITHIN), firing()


def test_a_stopped_rank_is_an_alert_until_it_goes_on(site: Site) -> None:
    alert = ("MclRankGone", "1")
    assert alert not in site.prometheus.firing()
    os.kill(site.ranks[1], signal.SIGSTOP)
    try:
        assert until(lambda: alert in site.prometheus.firing(), FIRES_WITHIN)
    finally:
        os.kill(site.ranks[1], signal.SIGCONT)
    assert until(lambda: alert not in site.prometheus.firing(), GOES_WITHIN)

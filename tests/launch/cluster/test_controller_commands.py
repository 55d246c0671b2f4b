"""The commands that `mcl pretrain --hostfile` sends to hosts; small programs replace ssh and the hosts' Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.cli import main as cli
from launch.cluster import controller
from launch.cluster.controller import failure_cause
from launch.cluster.ssh import UNREACHABLE
from launch.supervision.outcome import HUNG, KILLED, LOST, Outcome
from mcl_dist.distributed.heartbeat import STEPPING, Beat, beat_file
from mcl_dist.distributed.shutdown import SIGNALS
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
# A host is this machine: ssh's last argument is run here, after what a test inserts.
SSH = 'for command; do :; done\n{first}\nexec sh -c "$command"\n'
# In place of `python -m mcl_dist pretrain …` on a host.
OPTIONS = """node=0; while [ $# -gt 0 ]; do
case "$1" in --runtime) runtime=$2;; --node-rank) node=$2;; esac; shift; done
"""
# Starts slowly, as Python does; ends by itself, so that no test waits forever.
SUPERVISOR = """{before}
mkdir -p $runtime; echo $$ > $runtime/supervisor.pid
for count in $(seq 200); do sleep 0.05; done"""


class FakeHosts:
    """Hosts of a hostfile.

    Attributes:
        work: folder where programs record what they do.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.replace_ssh()

    def replace_ssh(self, first: str = "") -> None:
        """Run a shell script before each command on a host."""
        self._write_program("ssh", SSH.format(first=first))

    def replace_python(self, script: str) -> None:
        """Set what every host runs; `$node` is its number, `$runtime` the supervisor's folder."""
        self._write_program("python", OPTIONS + script)

    def pretrain(self, num_hosts: int, *more: str, launcher: str = "ssh") -> int:
        """Run the command; returns its exit code."""
        hostfile = self.work / "hosts"
        hostfile.write_text("".join(f"node{number} slots=1\n" for number in range(num_hosts)))
        arguments = ["pretrain", "--hostfile", str(hostfile), "--launcher", launcher, "--config", CONFIG]
        return cli.main([*arguments, "data.train=shards", f"train.global_batch={4 * num_hosts}", *more])

    def _write_program(self, name: str, script: str) -> None:
        (self.work / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.work / name).chmod(0o755)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHosts]:
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(controller, "RETRY_SECONDS", 0.1)
    yield FakeHosts(tmp_path)
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.slow
def test_a_stop_request_reaches_hosts_that_cannot_take_it_at_first(hosts: FakeHosts) -> None:
    refused = hosts.work / "refused"
    hosts.replace_ssh(
        f"""case "$command" in *--attached*) kill -TERM $PPID;; *"kill -TERM"*) sh -c "$command"; touch {refused}; exit
        esac"""
    )
    wait = f"trap 'touch {hosts.work}/stopped-'$node'; exit 75' TERM; until [ -e {refused} ]; do sleep 0.05; done"
    hosts.replace_python(SUPERVISOR.format(before=wait))
    assert hosts.pretrain(2) == 75
    assert sorted(file.name for file in hosts.work.glob("stopped-*")) == ["stopped-0", "stopped-1"]


@pytest.mark.slow
def test_a_second_interrupt_kills_all_hosts_at_once(hosts: FakeHosts) -> None:
    hosts.replace_ssh('case "$command" in *--attached*|*"kill -TERM"*) kill -INT $PPID; esac')
    pid = hosts.work / "pid"
    hosts.replace_python(SUPERVISOR.format(before=f"trap '' TERM; echo $$ > {pid}"))
    assert hosts.pretrain(1) == 130
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


COUNT = """attempt=$(($(cat {work}/attempt) + 1)); echo $attempt > {work}/attempt; mkdir -p $runtime
"""
FAIL = "cp -r {work}/$attempt $runtime/attempt-1; exit 76"
LIMITS = ("supervise.restarts=1", "supervise.progress_steps=100")


def fail_at_steps(hosts: FakeHosts, *steps: int) -> None:
    """Make a host's attempts fail, one at each of these steps; the attempt after them succeeds."""
    (hosts.work / "attempt").write_text("0")
    for attempt, step in enumerate(steps, 1):
        (hosts.work / str(attempt)).mkdir()
        beat = Beat(rank=0, pid=1, step=step, phase=STEPPING, since=0.0, written_at=0.0, median_step_seconds=None)
        beat_file(hosts.work / str(attempt), 0).write_text(json.dumps(asdict(beat)).ljust(256))
    fail = f"[ $attempt -le {len(steps)} ] && {{ {FAIL.format(work=hosts.work)}; }}; exit 0"
    hosts.replace_python(COUNT.format(work=hosts.work) + fail)


@pytest.mark.slow
def test_a_run_that_makes_progress_restarts_beyond_the_limit(hosts: FakeHosts) -> None:
    fail_at_steps(hosts, 50, 150, 260)
    assert hosts.pretrain(1, *LIMITS) == 0


@pytest.mark.slow
def test_a_run_without_progress_fails_at_the_limit(hosts: FakeHosts, capsys: pytest.CaptureFixture[str]) -> None:
    fail_at_steps(hosts, 150, 180, 200)
    assert hosts.pretrain(1, *LIMITS) == 1
    assert "given up after 1 restarts without progress: node0 exited with code 76" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("pdsh"), reason="there is no pdsh here")
def test_pdsh_starts_many_hosts_with_a_long_environment(
    hosts: FakeHosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "/a path/it's 100%h:" * 90
    monkeypatch.setenv("NCCL_LONG", long)
    hosts.replace_ssh('case "$command" in *"echo ended") echo ended; exit; esac')  # a real search takes long
    hosts.replace_python('echo "I am $node of $NCCL_LONG"')
    assert hosts.pretrain(64, launcher="pdsh") == 0
    lines = {line for line in capsys.readouterr().out.splitlines() if "I am" in line}
    assert lines == {f"node{number}: I am {number} of {long}" for number in range(64)}


def test_the_outcome_that_is_no_consequence_of_another_explains_a_failed_attempt() -> None:
    outcomes = {"node1": Outcome(1, LOST, "node 1 has disconnected"), "node2": Outcome(1, HUNG, "step 9 takes 80 s")}
    assert failure_cause({"node1": 76, "node2": 76}, outcomes) == Outcome(1, HUNG, "node2: step 9 takes 80 s")


def test_a_lost_host_explains_a_failed_attempt_before_any_outcome() -> None:
    exit_codes, outcomes = {"node1": 76, "node2": UNREACHABLE}, {"node1": Outcome(1, KILLED, "rank 0 left")}
    expected = Outcome(1, LOST, "node1 exited with code 76, node2 was lost")
    assert failure_cause(exit_codes, outcomes) == expected

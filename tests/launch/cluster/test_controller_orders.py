"""What `mcl pretrain --hostfile` tells hosts and when: programs stand in place of ssh and of what hosts run."""

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
from launch.cluster import controller as cluster
from launch.cluster.hostfile import Host
from launch.cluster.remote_shell import RemoteShell
from launch.cluster.ssh import Ssh
from mcl_dist.distributed.heartbeat import STEPPING, Beat, beat_file
from mcl_dist.distributed.shutdown import SIGNALS
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SECONDS = 20.0
# A host is this machine; what is done there is the last word. Tests put first what else is to happen.
SSH = 'for command; do :; done\n{first}\nexec sh -c "$command"\n'
# In place of `python -m mcl_dist pretrain …` on a host.
OPTIONS = """node=0; while [ $# -gt 0 ]; do
case "$1" in --runtime) runtime=$2;; --node-rank) node=$2;; esac; shift; done
"""
# Takes its time to start, as Python does; leaves by itself after a while, so that no test waits for ever.
SUPERVISOR = """{before}
mkdir -p $runtime; echo $$ > $runtime/supervisor.pid
for turn in $(seq 200); do sleep 0.05; done"""


class Cluster:
    """Hosts of a hostfile.

    Attributes:
        work: where programs leave word of what they did.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.ssh()

    def ssh(self, first: str = "") -> None:
        """What is done on this machine before a command is run on a host."""
        self._program("ssh", SSH.format(first=first))

    def host(self, script: str) -> None:
        """What every host runs; `$node` is its number, `$runtime` the supervisor's folder."""
        self._program("python", OPTIONS + script)

    def pretrain(self, num_hosts: int, *more: str, launcher: str = "ssh") -> int:
        """The command's exit code."""
        hostfile = self.work / "hosts"
        hostfile.write_text("".join(f"node{number} slots=1\n" for number in range(num_hosts)))
        words = ["pretrain", "--hostfile", str(hostfile), "--launcher", launcher, "--config", CONFIG]
        return cli.main([*words, "data.train=shards", f"train.global_batch={4 * num_hosts}", *more])

    def _program(self, name: str, script: str) -> None:
        (self.work / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.work / name).chmod(0o755)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(cluster, "RETRY_SECONDS", 0.1)
    yield Cluster(tmp_path)
    for number, handler in before:
        signal.signal(number, handler)


def test_a_request_to_stop_that_comes_before_the_hosts_can_take_it_reaches_all_of_them(hosts: Cluster) -> None:
    refused = hosts.work / "refused"
    hosts.ssh(
        f"""case "$command" in *--attached*) kill -TERM $PPID;; *"kill -TERM"*) sh -c "$command"; touch {refused}; exit
        esac"""
    )
    waits = f"trap 'touch {hosts.work}/stopped-'$node'; exit 75' TERM; until [ -e {refused} ]; do sleep 0.05; done"
    hosts.host(SUPERVISOR.format(before=waits))
    assert hosts.pretrain(2) == 75
    assert sorted(file.name for file in hosts.work.glob("stopped-*")) == ["stopped-0", "stopped-1"]


def test_a_second_interrupt_ends_all_hosts_at_once(hosts: Cluster) -> None:
    hosts.ssh('case "$command" in *--attached*|*"kill -TERM"*) kill -INT $PPID; esac')
    pid = hosts.work / "pid"
    hosts.host(SUPERVISOR.format(before=f"trap '' TERM; echo $$ > {pid}"))
    assert hosts.pretrain(1) == 130
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


FAILS = "cp -r {work}/$turn $runtime/attempt-1; exit 76"
TURNS = """turn=$(($(cat {work}/turn) + 1)); echo $turn > {work}/turn; mkdir -p $runtime
"""


def leaves_behind(hosts: Cluster, *steps: int) -> None:
    """What a host runs: an attempt for every step, which fails when it has come so far; the next comes to the end."""
    (hosts.work / "turn").write_text("0")
    for turn, step in enumerate(steps, 1):
        (hosts.work / str(turn)).mkdir()
        beat = Beat(rank=0, pid=1, step=step, phase=STEPPING, since=0.0, told=0.0, usual=None)
        beat_file(hosts.work / str(turn), 0).write_text(json.dumps(asdict(beat)).ljust(256))
    fails = f"[ $turn -le {len(steps)} ] && {{ {FAILS.format(work=hosts.work)}; }}; exit 0"
    hosts.host(TURNS.format(work=hosts.work) + fails)


LIMITS = ("supervise.restarts=1", "supervise.progress_steps=100")


def test_a_run_that_comes_farther_each_time_is_started_again_for_as_long_as_it_does(hosts: Cluster) -> None:
    leaves_behind(hosts, 50, 150, 260)
    assert hosts.pretrain(1, *LIMITS) == 0


def test_a_run_that_comes_no_farther_is_given_up(hosts: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    leaves_behind(hosts, 150, 180, 200)
    assert hosts.pretrain(1, *LIMITS) == 1
    assert "given up after 1 restarts without progress: node0 left with 76" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("pdsh"), reason="there is no pdsh here")
def test_pdsh_starts_many_hosts_however_long_their_environment_is(
    hosts: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "/a path/it's 100%h:" * 90
    monkeypatch.setenv("NCCL_LONG", long)
    hosts.ssh('case "$command" in *"echo ended") echo ended; exit; esac')  # nothing is left, and looking takes long
    hosts.host('echo "I am $node of $NCCL_LONG"')
    assert hosts.pretrain(64, launcher="pdsh") == 0
    told = {line for line in capsys.readouterr().out.splitlines() if "I am" in line}
    assert told == {f"node{number}: I am {number} of {long}" for number in range(64)}


class Here(Ssh):
    """Runs what is for a host on this machine."""

    def command(self, host: str, command: str) -> list[str]:  # noqa: ARG002
        return ["sh", "-c", command]


class ClosedTerminal:
    """What standard output is when its terminal has gone."""

    def write(self, text: str) -> int:
        raise OSError(5, f"cannot show {text}")

    def flush(self) -> None:
        raise OSError(5, "cannot flush")


def test_how_a_host_ends_is_heard_when_the_terminal_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedTerminal())
    with RemoteShell([Host("node1", 1)], "echo told; exit 76", "ssh", Here()) as fleet:
        fleet.wait(SECONDS)
    assert fleet.codes == {"node1": 76}

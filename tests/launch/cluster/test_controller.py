"""Runs on hosts of their own, with and without a hostfile: one loses power, a link is cut, and no bit is lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.controller import _cause
from launch.cluster.hostfile import Host
from launch.cluster.remote_shell import RemoteShell
from launch.cluster.ssh import UNREACHABLE, Ssh
from launch.supervision.outcome import HUNG, KILLED, LOST, OUTCOME_LINE, Outcome
from tests.support.hosts import Rig, missing, running_hosts
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
NO_REPORT = "run.report=false"  # what it costs is another test's matter
LENGTH = ("train.steps=24", "checkpoint.every=8")
SECONDS = 150

needs_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_hosts(tmp_path_factory.mktemp("cluster") / "rig") as rig:
        yield rig


def start(rig: Rig, shards: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "mcl_dist", "pretrain", "--hostfile", str(rig.hostfile), "--config", CONFIG]
    words += [
        "--ssh-config",
        str(rig.ssh_config),
        *more,
        f"data.train={shards}",
        f"run.dir={run}",
        NO_REPORT,
        *SMALL,
        *LENGTH,
    ]
    return rig.head.popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_without_ssh(rig: Rig, shards: Path, run: Path) -> list[subprocess.Popen[str]]:
    """The command of its own on every host."""
    words = [sys.executable, "-m", "mcl_dist", "pretrain", "--config", CONFIG, "--ranks", "1", "--nodes", "2"]
    words += ["--master-addr", "node1", "--master-port", "29700"]
    settings = [f"data.train={shards}", f"run.dir={run}", *SMALL, *LENGTH]
    return [
        host.popen(
            f"cd {REPOSITORY} && exec {shlex.join([*words, '--node-rank', str(node), *settings])}",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, host in enumerate(rig.hosts)
    ]


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints/step-000000024").glob("*.safetensors")}


def has_saved(run: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not (run / "checkpoints" / "step-000000008" / "COMMITTED").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(rig: Rig, synthetic_shards: Path) -> Path:
    code, output = finished(start(rig, synthetic_shards, rig.work / "whole", "--launcher", "pdsh"))
    assert code == 0, output
    return rig.work / "whole"


@needs_hosts
@pytest.mark.slow
def test_a_run_over_plain_ssh_is_the_run_over_pdsh(rig: Rig, whole: Path, synthetic_shards: Path) -> None:
    code, output = finished(start(rig, synthetic_shards, rig.work / "plain", "--launcher", "ssh"))
    assert code == 0, output
    assert losses(rig.work / "plain") == losses(whole)
    assert weights(rig.work / "plain") == weights(whole)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_nodes_that_are_each_given_the_command_train_the_run_of_the_hostfile(
    rig: Rig, whole: Path, synthetic_shards: Path
) -> None:
    run = rig.work / "headless"
    for code, output in [finished(process) for process in start_without_ssh(rig, synthetic_shards, run)]:
        assert code == 0, output
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_nodes_without_a_head_recover_by_themselves_when_the_ranks_of_one_are_killed(
    rig: Rig, whole: Path, synthetic_shards: Path
) -> None:
    run = rig.work / "headless killed"
    processes = start_without_ssh(rig, synthetic_shards, run)
    has_saved(run)
    ranks = [
        pid
        for pid, line in rig[1].processes().items()
        if "launch/pretrain.py" in line and "deepspeed.launcher" not in line
    ]
    assert ranks
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    for code, output in [finished(process) for process in processes]:
        assert code == 0, output
    assert weights(run) == weights(whole)
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    (restarted,) = (event for event in events if event["event"] == "Restarted")
    assert restarted["cause"] == KILLED
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_port_that_is_taken_is_told_in_one_line_with_the_option_for_another(rig: Rig, synthetic_shards: Path) -> None:
    listen = (
        "import socket, sys; taken = socket.create_server(('', 29800)); print('ready', flush=True); sys.stdin.read()"
    )
    holder = rig[0].popen(
        f'exec {sys.executable} -c "{listen}"', stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    code, output = finished(start(rig, synthetic_shards, rig.work / "taken", "--master-port", "29800"))
    holder.communicate()
    assert code == 1
    (line,) = (line for line in output.splitlines() if "29800" in line and "waiting at" not in line)
    assert "port 29800: cannot be listened on (Address already in use" in line
    assert line.endswith("; choose another --master-port")


class Here(Ssh):
    """Runs what is for a host on this machine."""

    def command(self, host: str, command: str) -> list[str]:  # noqa: ARG002
        return ["sh", "-c", command]


def test_why_an_attempt_failed_is_what_the_supervisors_say_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    hung, missed = Outcome(1, HUNG, "step 9 takes 80 s"), Outcome(1, LOST, "node 1 has gone")
    outcomes = [f"'{OUTCOME_LINE} {json.dumps(vars(end) | {'retry': True})}'" for end in (missed, hung)]
    command = f"echo told; case $node in 0) echo {outcomes[0]};; 1) echo {outcomes[1]};; esac; exit 76"
    with RemoteShell([Host("node1", 1), Host("node2", 1)], command, "ssh", Here()) as fleet:
        fleet.wait(SECONDS)
    assert fleet.codes == {"node1": 76, "node2": 76}
    assert _cause(fleet.codes, fleet.ends) == Outcome(1, HUNG, "node2: step 9 takes 80 s")
    assert sorted(capsys.readouterr().out.splitlines()) == ["node1: told", "node2: told"]


def test_a_host_that_is_lost_is_the_cause_whatever_the_others_say() -> None:
    codes, ends = {"node1": 76, "node2": UNREACHABLE}, {"node1": Outcome(1, KILLED, "rank 0 left")}
    assert _cause(codes, ends) == Outcome(1, LOST, "node1 left with 76, node2 was lost")


@needs_hosts
@pytest.mark.slow
def test_a_host_that_loses_power_and_comes_back_costs_no_bit(rig: Rig, whole: Path, synthetic_shards: Path) -> None:
    run = rig.work / "power"
    process = start(rig, synthetic_shards, run, "--launcher", "pdsh")
    has_saved(run)
    rig[1].kill()
    rig[1].boot()
    code, output = finished(process)
    assert code == 0, output
    assert weights(run) == weights(whole)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_link_that_is_cut_for_a_while_costs_no_bit(rig: Rig, whole: Path, synthetic_shards: Path) -> None:
    run = rig.work / "link"
    process = start(rig, synthetic_shards, run, "--launcher", "ssh")
    has_saved(run)
    rig[1].link_down()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "waiting for node2" in line:
            break
    rig[1].link_up()
    code, output = finished(process)
    assert code == 0, "".join(lines) + output
    assert weights(run) == weights(whole)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_host_that_stays_away_is_left_out_where_the_run_may_have_fewer(rig: Rig, synthetic_shards: Path) -> None:
    runs = rig.work / "two", rig.work / "one left"
    together = "encoder.batch_norm=synchronized"
    code, output = finished(start(rig, synthetic_shards, runs[0], together))
    assert code == 0, output
    process = start(rig, synthetic_shards, runs[1], "--min-nodes", "1", "--node-wait", "5", together)
    has_saved(runs[1])
    rig[1].kill()
    code, output = finished(process)
    rig[1].boot()
    assert code == 0, output
    assert "going on without node2, on 1 of 2 hosts" in output
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-4)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_request_to_stop_saves_and_leaves_with_75(rig: Rig, synthetic_shards: Path) -> None:
    run = rig.work / "stopped"
    process = start(rig, synthetic_shards, run, "--launcher", "pdsh", "train.steps=2400")
    has_saved(run)
    process.terminate()
    code, output = finished(process)
    assert code == 75, output
    assert not any(host.processes() for host in rig.hosts)

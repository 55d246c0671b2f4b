"""Runs on virtual hosts, with and without a hostfile, through power failures and broken links."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.supervision.outcome import KILLED
from launch.supervision.processes import wait_until
from tests.support.hosts import Rig, missing, running_hosts
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
NO_REPORT = "run.report=false"  # another test measures its cost
LENGTH = ("train.steps=24", "checkpoint.every=8")
SECONDS = 150

needs_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running_hosts(tmp_path_factory.mktemp("cluster") / "rig") as rig:
        yield rig


def start(rig: Rig, shards: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mcl_dist", "pretrain", "--hostfile", str(rig.hostfile), "--config", CONFIG]
    command += ["--ssh-config", str(rig.ssh_config), *more]
    command += [f"data.train={shards}", f"run.dir={run}", NO_REPORT, *SMALL, *LENGTH]
    return rig.head.popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_without_ssh(rig: Rig, shards: Path, run: Path) -> list[subprocess.Popen[str]]:
    """Run the command on every host by itself."""
    command = [sys.executable, "-m", "mcl_dist", "pretrain", "--config", CONFIG, "--ranks", "1", "--nodes", "2"]
    command += ["--master-addr", "node1", "--master-port", "29700"]
    settings = [f"data.train={shards}", f"run.dir={run}", *SMALL, *LENGTH]
    return [
        host.popen(
            f"cd {REPOSITORY} && exec {shlex.join([*command, '--node-rank', str(node), *settings])}",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, host in enumerate(rig.hosts)
    ]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints/step-000000024").glob("*.safetensors")}


def wait_for_checkpoint(run: Path) -> None:
    assert wait_until((run / "checkpoints" / "step-000000008" / "COMMITTED").exists, SECONDS)


@pytest.fixture(scope="module")
def undisturbed(rig: Rig, synthetic_shards: Path) -> Path:
    code, output = finish(start(rig, synthetic_shards, rig.work / "undisturbed", "--launcher", "pdsh"))
    assert code == 0, output
    return rig.work / "undisturbed"


@needs_hosts
@pytest.mark.slow
def test_a_run_over_ssh_equals_the_run_over_pdsh(rig: Rig, undisturbed: Path, synthetic_shards: Path) -> None:
    code, output = finish(start(rig, synthetic_shards, rig.work / "plain", "--launcher", "ssh"))
    assert code == 0, output
    assert losses(rig.work / "plain") == losses(undisturbed)
    assert weights(rig.work / "plain") == weights(undisturbed)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_run_without_a_hostfile_equals_the_run_with_one(rig: Rig, undisturbed: Path, synthetic_shards: Path) -> None:
    run = rig.work / "without ssh"
    for code, output in [finish(process) for process in start_without_ssh(rig, synthetic_shards, run)]:
        assert code == 0, output
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_nodes_without_a_controller_restart_together_when_the_ranks_of_one_are_killed(
    rig: Rig, undisturbed: Path, synthetic_shards: Path
) -> None:
    run = rig.work / "without ssh, killed"
    processes = start_without_ssh(rig, synthetic_shards, run)
    wait_for_checkpoint(run)
    ranks = [
        pid
        for pid, line in rig[1].processes().items()
        if "launch/pretrain.py" in line and "deepspeed.launcher" not in line
    ]
    assert ranks
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    for code, output in [finish(process) for process in processes]:
        assert code == 0, output
    assert weights(run) == weights(undisturbed)
    events = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    (restarted,) = (event for event in events if event["event"] == "Restarted")
    assert restarted["cause"] == KILLED
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_port_in_use_is_reported_in_one_line_with_the_option_for_another(rig: Rig, synthetic_shards: Path) -> None:
    listen = (
        "import socket, sys; taken = socket.create_server(('', 29800)); print('ready', flush=True); sys.stdin.read()"
    )
    holder = rig[0].popen(
        f'exec {sys.executable} -c "{listen}"', stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    code, output = finish(start(rig, synthetic_shards, rig.work / "taken", "--master-port", "29800"))
    holder.communicate()
    assert code == 1
    (line,) = (line for line in output.splitlines() if "29800" in line and "waiting at" not in line)
    assert "port 29800: cannot listen (Address already in use" in line
    assert line.endswith("; choose another --master-port")


@needs_hosts
@pytest.mark.slow
def test_a_run_whose_host_loses_power_and_reboots_ends_with_the_same_weights(
    rig: Rig, undisturbed: Path, synthetic_shards: Path
) -> None:
    run = rig.work / "power"
    process = start(rig, synthetic_shards, run, "--launcher", "pdsh")
    wait_for_checkpoint(run)
    rig[1].kill()
    rig[1].boot()
    code, output = finish(process)
    assert code == 0, output
    assert weights(run) == weights(undisturbed)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_run_whose_link_is_cut_for_a_while_ends_with_the_same_weights(
    rig: Rig, undisturbed: Path, synthetic_shards: Path
) -> None:
    run = rig.work / "link"
    process = start(rig, synthetic_shards, run, "--launcher", "ssh")
    wait_for_checkpoint(run)
    rig[1].link_down()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "waiting for node2" in line:
            break
    rig[1].link_up()
    code, output = finish(process)
    assert code == 0, "".join(lines) + output
    assert weights(run) == weights(undisturbed)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_run_with_min_nodes_continues_without_a_host_that_stays_down(rig: Rig, synthetic_shards: Path) -> None:
    runs = rig.work / "two hosts", rig.work / "one host"
    synchronized = "encoder.batch_norm=synchronized"
    code, output = finish(start(rig, synthetic_shards, runs[0], synchronized))
    assert code == 0, output
    process = start(rig, synthetic_shards, runs[1], "--min-nodes", "1", "--node-wait", "5", synchronized)
    wait_for_checkpoint(runs[1])
    rig[1].kill()
    code, output = finish(process)
    rig[1].boot()
    assert code == 0, output
    assert "continuing without node2, on 1 of 2 hosts" in output
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-4)
    assert not any(host.processes() for host in rig.hosts)


@needs_hosts
@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_exits_with_75(rig: Rig, synthetic_shards: Path) -> None:
    run = rig.work / "stopped"
    process = start(rig, synthetic_shards, run, "--launcher", "pdsh", "train.steps=2400")
    wait_for_checkpoint(run)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert not any(host.processes() for host in rig.hosts)

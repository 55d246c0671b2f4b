"""The Slurm batch script, run with fake Slurm programs, and the Kubernetes manifests."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run.config import PretrainConfig
from mcl_dist.config import load_config
from tests.support.paths import REPOSITORY

LAUNCH = REPOSITORY / "launch"
BATCH = LAUNCH / "slurm" / "pretrain.sbatch"
# In place of Slurm's programs and `mcl`; they record how they are called.
PROGRAMS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "n1\\nn2\\n"; exit 0',
    "scancel": 'echo "scancel $*" >> "$CALLS"; for pid in $(cat "$CALLS".pids); do kill -USR1 $pid; done',
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done
worst=0; for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done; echo $pids > "$CALLS".pids
for pid in $pids; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done; exit $worst""",
    "mcl": """echo "mcl $*" >> "$CALLS"; [ -n "$CODE" ] && exit $CODE
trap 'exit 75' USR1; touch "$CALLS".$SLURM_NODEID; while :; do sleep 0.05; done""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, script in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]"}
    return {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (75, True)])
def test_a_slurm_job_starts_every_node_and_is_requeued_after_a_stop(
    slurm: dict[str, str], code: int, is_requeued: bool
) -> None:
    command = ["bash", BATCH, "--config", "c.yaml", "run.dir=runs/a b"]
    result = subprocess.run(command, env={**slurm, "CODE": str(code)}, check=False, timeout=20)
    calls = Path(slurm["CALLS"]).read_text().splitlines()
    start = "mcl pretrain --config c.yaml run.dir=runs/a b --nodes 2 --master-addr n1 --master-port 22345 --node-rank"
    assert sorted(line for line in calls if line.startswith("mcl")) == [f"{start} 0", f"{start} 1"]
    assert ("scontrol requeue 12345" in calls) == is_requeued
    assert result.returncode == code


def test_a_preempted_slurm_job_stops_its_nodes_and_is_requeued(slurm: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", BATCH, "--config", "c.yaml"], env={**slurm, "CODE": ""})
    while not all(Path(f"{slurm['CALLS']}.{node}").exists() for node in (0, 1)):
        os.sched_yield()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 75
    assert "scontrol requeue 12345" in Path(slurm["CALLS"]).read_text().splitlines()


def pods(manifest: Any) -> list[dict[str, Any]]:
    """The specifications of all pods in a manifest."""
    if not isinstance(manifest, dict):
        return []
    own = [manifest["template"]["spec"]] if "template" in manifest else []
    return own + [pod for part in manifest.values() for pod in pods(part)]


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_a_manifest_gives_time_to_save_and_mounts_secrets_as_files(name: str) -> None:
    text = (LAUNCH / "kubernetes" / name).read_text()
    found = [pod for manifest in yaml.safe_load_all(text) for pod in pods(manifest)]
    assert found
    for pod in found:
        (container,) = pod["containers"]
        assert container["args"][:2] == ["mcl", "pretrain"]
        assert pod["terminationGracePeriodSeconds"] >= 120
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all("valueFrom" not in variable for variable in container["env"])
        files = [variable["value"] for variable in container["env"] if "CREDENTIALS" in variable["name"]]
        assert files == ["/secrets/aws/credentials"]


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml"])
def test_a_pod_waits_a_day_for_the_others_before_it_fails_the_job(name: str) -> None:
    text = (LAUNCH / "kubernetes" / name).read_text()
    for pod in (pod for manifest in yaml.safe_load_all(text) for pod in pods(manifest)):
        settings = [text for text in pod["containers"][0]["args"] if "=" in text and not text.startswith("--")]
        config = load_config(PretrainConfig, str(LAUNCH.parent / "configs/pretrain/kinetics400.yaml"), settings)
        assert config.supervise.join_seconds == 24 * 3600


def test_the_plain_job_distinguishes_stopped_from_failed() -> None:
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text())
    rules = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {(1, 2): "FailJob", (75,): "Ignore"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2

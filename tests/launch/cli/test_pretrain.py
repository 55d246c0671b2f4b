"""`mcl pretrain` end to end: a real shard set, the DeepSpeed launcher, two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli.main import main
from tests.support.paths import REPOSITORY
from tests.support.processes import pids_of_run

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")
SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
NO_REPORT = "run.report=false"  # another test measures its cost
LOSSES = ("loss", "loss_inter", "loss_intra", "loss_alignment", "loss_order")
KEYS = ("step", "epoch", *LOSSES, "learning_rate", "videos_per_second", "data_wait_ratio")
LENGTH = ("train.steps=24", "checkpoint.every=8")
SECONDS = 300


def arguments_for(shards: Path, run: Path, *more: str) -> list[str]:
    return ["--config", CONFIG, f"data.train={shards}", f"run.dir={run}", NO_REPORT, *SMALL, *more]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_everything(process: subprocess.Popen[str], run: Path) -> None:
    """Kill the launchers and every rank at once, like a power failure."""
    for pid in pids_of_run(run):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=SECONDS)


def kill_command(process: subprocess.Popen[str], run: Path) -> None:  # noqa: ARG001
    """Kill only the command, like a user's `kill -9`; its ranks save before they exit."""
    process.kill()
    process.communicate(timeout=SECONDS)


@pytest.fixture(scope="module")
def finished_run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("run")
    code, output = finish(start(*arguments_for(synthetic_shards, run, *LENGTH, "run.report=true"), "--ranks", "2"))
    assert code == 0, output
    return run, output


@pytest.mark.slow
def test_two_ranks_train_and_log_every_step(finished_run: tuple[Path, str]) -> None:
    run, output = finished_run
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert all(set(KEYS) <= set(line) for line in lines)
    assert "peak memory" in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000000008",
        "step-000000016",
        "step-000000024",
    ]
    assert (run / "config.yaml").exists()
    assert "<h2>Alignment</h2>" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_deepspeed_launcher_alone_trains_the_same_run(
    synthetic_shards: Path, finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    arguments = [*LENGTH, *arguments_for(synthetic_shards, tmp_path)]  # overrides before and after an option
    result = subprocess.run(
        [launcher, "--num_gpus", "2", REPOSITORY / "launch" / "pretrain.py", *arguments],
        env={**os.environ, "MASTER_PORT": "0", "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["loss"] for line in metrics(tmp_path)] == [line["loss"] for line in metrics(finished_run[0])]


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "every"), [(kill_everything, 8), (kill_command, 1)])
def test_a_killed_run_resumes_from_its_checkpoint_and_reports_it(
    synthetic_shards: Path,
    finished_run: tuple[Path, str],
    tmp_path: Path,
    kill: Callable[[subprocess.Popen[str], Path], None],
    every: int,
) -> None:
    arguments = [*arguments_for(synthetic_shards, tmp_path, *LENGTH), "--ranks", "2"]
    killed = start(*arguments)
    assert killed.stdout is not None
    assert any("checkpoint of step 8" in line for line in killed.stdout)
    kill(killed, tmp_path)
    code, output = finish(start(*arguments))
    assert code == 0, output
    resumed = re.search(r"resumed from \S+/step-0*(\d+), \1 of 24 steps done", output)
    assert resumed, output
    assert int(resumed[1]) % every == 0
    assert [line["loss"] for line in metrics(tmp_path)] == [line["loss"] for line in metrics(finished_run[0])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("encoder.width=8", "holds another architecture"), ("run.seed=7", "made with run.seed=0, now 7")],
)
def test_the_folder_of_another_run_is_refused(
    synthetic_shards: Path, finished_run: tuple[Path, str], change: str, message: str
) -> None:
    run, _ = finished_run
    code, output = finish(start(*arguments_for(synthetic_shards, run, *LENGTH, change)))
    assert code == 1
    assert [line for line in output.splitlines() if line.startswith("mcl: ") and message in line]


@pytest.mark.slow
def test_a_run_starts_from_the_exported_encoder_of_another(
    synthetic_shards: Path, finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    frozen = "optimizer.learning_rate=0"
    assert main(["export", str(finished_run[0]), "--format", "safetensors", "--out", str(first)]) == 0
    settings = arguments_for(synthetic_shards, tmp_path / "run", "train.steps=1", frozen, f"initial.weights={first}")
    code, output = finish(start(*settings))
    assert code == 0, output
    assert f"initial weights from {first}; random: none" in output
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(second)]) == 0
    exported, initial = load_file(first), load_file(second)
    assert exported.keys() == initial.keys()
    for name in exported:
        if "running_" not in name and "num_batches" not in name:  # BatchNorm updates these in a step
            assert torch.equal(exported[name], initial[name]), name


@pytest.mark.slow
def test_a_damaged_video_is_replaced_and_listed_or_named_as_one_too_many(
    synthetic_shards: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    tar = damaged / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    jpeg = data.rfind(b"\xff\xd8\xff")  # the last frame of the last video, which the last rank reads
    data[jpeg : jpeg + 4096] = bytes(len(data[jpeg : jpeg + 4096]))
    tar.chmod(0o644)
    tar.write_bytes(data)
    run = tmp_path / "run"

    code, output = finish(start(*arguments_for(damaged, run, "train.steps=24"), "--ranks", "2"))
    assert code == 0, output
    (listed,) = map(json.loads, (run / "bad_samples-00001.jsonl").read_text().splitlines())
    assert listed["reason"] == "checksum"
    assert not (run / "bad_samples.jsonl").exists()

    settings = arguments_for(damaged, run, "train.steps=99", "data.max_bad_fraction=0")
    code, output = finish(start(*settings, "--ranks", "2"))
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("mcl: rank 1: "))
    assert listed["key"] in line
    assert f"run `mcl shards verify {damaged}`" in line
    assert "Traceback" not in output
    assert '"event": "Failed"' in (run / "log-00001.jsonl").read_text()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line(synthetic_shards: Path, tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=200k none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace")
    command = [sys.executable, "-m", "launch.cli.main", "pretrain", *arguments_for(synthetic_shards, tmp_path, *LENGTH)]
    result = subprocess.run([*mount, tmp_path, *command], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 1, result.stdout + result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("mcl: "))
    assert "no space left; free some" in line


@pytest.mark.slow
def test_a_missing_shard_set_is_named_in_one_line(tmp_path: Path) -> None:
    code, output = finish(start(*arguments_for(tmp_path / "nothing", tmp_path / "run")))
    assert code == 1
    (line,) = (line for line in output.splitlines() if line.startswith("mcl: "))
    assert "nothing" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", "trian: unknown key; did you mean `train`?"),
        ("train.steps=many", "train.steps: found 'many', must be a whole number at least 1"),
        ("train.global_batch=5", "train.global_batch: 5 is not divisible by 2 ranks"),
        ("data.crop=50", "data.crop"),
        ("data.frames=18", "data.frames"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["pretrain", *arguments_for(tmp_path, tmp_path / "run", override), "--ranks", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mcl: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", [("--ranks", "2"), ("--nodes", "2"), ("--node-rank", "0"), ("--master-addr", "node1")]
)
def test_an_option_that_a_hostfile_replaces_is_refused_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert (
        main(["pretrain", *arguments_for(tmp_path, tmp_path / "run"), "--hostfile", str(tmp_path / "hosts"), *option])
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mcl: {option[0]}: found {option[1]} beside --hostfile")

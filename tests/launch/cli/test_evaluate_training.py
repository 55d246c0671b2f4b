"""`mcl evaluate finetune` and `linear` as a user runs them: supervised ranks, a run folder, signals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.cli.main import main
from launch.evaluation.config import LinearEvaluation
from launch.evaluation.job import Job
from launch.evaluation.score_report import print_scores_once
from mcl_dist.config import build_config
from mcl_dist.errors import UserError
from mcl_dist.evaluation.metrics import BootstrapConfig, Predictions, score

PRETRAINED = """
run: {dir: unused, seed: 5}
data: {train: unused, frames: 8, stride: 4, crop: 32}
encoder: {width: 4, blocks: [1, 1]}
heads: {dim: 8}
"""
SMALL = ("clips.frames=8", "clips.count=2", "train.global_batch=4")
SECONDS = 300
RIGHT = Predictions({"top1": np.array([True])}, np.array([0]), np.array([0]))
SCORES = score(RIGHT, ["walk"], BootstrapConfig())


@pytest.fixture
def arguments(synthetic_shards: Path, tmp_path: Path) -> list[str]:
    """Arguments of a command that trains from scratch in the folder `run`."""
    (tmp_path / "pretrain.yaml").write_text(PRETRAINED)
    sets = ["--train", str(synthetic_shards), "--test", str(synthetic_shards), "--run-dir", str(tmp_path / "run")]
    return ["--checkpoint", "random", "--pretrain", str(tmp_path / "pretrain.yaml"), *sets, *SMALL]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli.main", "evaluate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_stopped_evaluation_resumes_and_prints_its_scores_as_json(arguments: list[str], tmp_path: Path) -> None:
    stopped = start("finetune", *arguments, "train.steps=100000")
    assert stopped.stderr is not None
    first_step = next(line for line in stopped.stderr if line.startswith("step "))
    stopped.send_signal(signal.SIGTERM)
    output, errors = stopped.communicate(timeout=SECONDS)
    assert stopped.returncode == 75, first_step + errors
    assert "which is saved: SIGTERM" in errors
    assert not output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()

    resumed = start("finetune", *arguments, f"train.steps={int(saved.name.removeprefix('step-')) + 2}", "--json")
    output, errors = resumed.communicate(timeout=SECONDS)
    assert resumed.returncode == 0, errors
    assert f"resumed from {saved}" in errors
    found = json.loads(output)
    assert (found["protocol"], found["videos"]) == ("finetune", 16)
    assert set(found["intervals"]) == {"top1", "top5", "mean_class"}
    (split,) = found["splits"]
    assert sum(map(sum, split["confusion"])) == 16


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("linear", "train.global_batch=5", "train.global_batch: 5 is not divisible by 2 ranks"),
        ("linear", "optimizer.zero_stage=3", "optimizer.zero_stage: found 3, must be at most 2"),
        ("linear", "clips.frames=2", "clips.frames: found 2, must be a whole number at least 4"),
        ("linear", "pretrain.encoder.wdith=4", "encoder.wdith: unknown key; did you mean `width`?"),
        ("finetune", "finetune.dropout=1", "finetune.dropout: found 1.0, must be a number at least 0 and at most 0.99"),
        ("finetune", "finetune.batch_norm=shuffled", "finetune.batch_norm: found 'shuffled'"),
        ("finetune", "recalibrate=true", "recalibrate: unknown key"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_before_ranks_start(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, change: str, message: str
) -> None:
    assert main(["evaluate", protocol, *arguments, change, "--ranks", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    index = arguments.index("--run-dir")
    assert main(["evaluate", "linear", *arguments[:index], *arguments[index + 2 :]]) == 2
    assert "run.dir: missing; set it in the file or as run.dir=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_the_configuration_file_of_a_protocol_equals_its_defaults(protocol: str) -> None:
    from launch.evaluation.config import FinetuneEvaluation, LinearEvaluation
    from mcl_dist.config import load_config

    schema = {"linear": LinearEvaluation, "finetune": FinetuneEvaluation}[protocol]
    of_file = load_config(schema, f"configs/evaluate/{protocol}.yaml")
    assert of_file == load_config(schema, None, [f"run.dir=runs/{protocol}"])


def test_each_split_has_its_own_folders() -> None:
    from launch.evaluation.config import LinearEvaluation
    from mcl_dist.config import load_config

    config = load_config(LinearEvaluation, None, ["run.dir=runs/a", "checkpoint.folder=s3://bucket/a"])
    split = config.in_subfolder("split-2")
    assert (split.run.dir, split.checkpoint.folder) == ("runs/a/split-2", "s3://bucket/a/split-2")
    assert load_config(LinearEvaluation, None, ["run.dir=runs/a"]).in_subfolder("split-2").checkpoint.folder is None


class ClosedPipe(io.StringIO):
    """A standard output whose reader is gone."""

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_closed_pipe_is_an_error_that_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    config = build_config(LinearEvaluation, {"run": {"dir": "unused"}})
    with pytest.raises(UserError, match="standard output: closed before the scores were read"):
        print_scores_once(Job("linear", "random", ["a"], ["b"]), [SCORES], config)

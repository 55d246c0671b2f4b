"""Ranks under the DeepSpeed launcher: their GPUs, and how they exit, also when their launcher is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.supervision.deepspeed_launcher import RUNTIME, launch_ranks
from launch.supervision.outcome import CRASHED, DONE, STOPPED, USER, read_outcomes
from launch.supervision.processes import ProcessEntry, wait_until

SECONDS = 20.0
LAUNCHER = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
signal.pause()
"""
RANK = """
import os, signal, sys
from pathlib import Path
from launch.supervision.deepspeed_launcher import stop_with_parent
from launch.supervision.processes import wait_until
from mcl_dist.distributed.shutdown import StopRequest
folder, stop = Path(sys.argv[1]), StopRequest()
stop_with_parent(stop, seconds=float(sys.argv[2]))
(folder / "new").write_text(str(os.getpid()))
(folder / "new").rename(folder / "pid")
"""
SAVE = 'wait_until(lambda: stop.is_requested, 20); (folder / "saved").write_text(stop.reason)'
IGNORE = "signal.pause()"


def visible_gpus(folder: Path, num_ranks: int) -> set[str]:
    """CUDA_VISIBLE_DEVICES of the ranks."""
    script = folder / "rank.py"
    script.write_text(
        "import os, pathlib\n"
        "file = pathlib.Path(__file__).with_name('gpus-' + os.environ['RANK'])\n"
        "file.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    assert launch_ranks(str(script), [], num_ranks) == 0
    gpus = [file.read_text() for file in folder.glob("gpus-*")]
    assert len(gpus) == num_ranks
    return set(gpus)


@pytest.mark.slow
def test_hidden_gpus_stay_hidden_from_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(tmp_path, 2) == {"-1,-1"}


@pytest.mark.slow
def test_ranks_get_the_gpus_that_the_user_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # for the launcher, which has no GPU here
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
    assert visible_gpus(tmp_path, 2) == {"5,3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "code", "cause"),
    [
        ("(_ for _ in ()).throw(UserError('no space left'))", 1, USER),
        ("(_ for _ in ()).throw(ConfigError('data.crop: too large'))", 2, USER),
        ("False", 75, STOPPED),
        ("True", 0, DONE),
        ("1 / 0", 1, CRASHED),
    ],
)
def test_a_rank_exits_with_the_code_and_outcome_of_its_work(tmp_path: Path, work: str, code: int, cause: str) -> None:
    imports = "from launch.supervision.deepspeed_launcher import run_as_rank; from mcl_dist.errors import *"
    environment = {**os.environ, RUNTIME: str(tmp_path), "RANK": "1"}
    command = [sys.executable, "-c", f"{imports}; run_as_rank(lambda: {work})"]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    outcome = read_outcomes(tmp_path)[1]
    assert (result.returncode, outcome.exit_code, outcome.cause) == (code, code, cause)


def leave_without_launcher(folder: Path, program: str, seconds: float) -> None:
    """Kill a rank's launcher, and wait until the rank has exited."""
    command = [sys.executable, "-c", LAUNCHER, RANK + program, str(folder), str(seconds)]
    launcher = subprocess.Popen(command, env={**os.environ, RUNTIME: str(folder)})
    try:
        assert wait_until((folder / "pid").exists, SECONDS)
    finally:
        launcher.kill()
        launcher.wait()
    rank = ProcessEntry(int((folder / "pid").read_text()))
    assert wait_until(lambda: rank.is_dead, SECONDS)


def test_a_rank_whose_launcher_is_gone_is_asked_to_stop(tmp_path: Path) -> None:
    leave_without_launcher(tmp_path, SAVE, seconds=SECONDS)
    assert (tmp_path / "saved").read_text() == "launcher gone"


def test_a_rank_that_does_not_stop_after_its_launcher_is_ended(tmp_path: Path) -> None:
    leave_without_launcher(tmp_path, IGNORE, seconds=0)

"""A run that is hurt or asked to stop, as its user sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.ends import CRASHED, DONE, HUNG, KILLED, LOST, STOPPED, USER, End, verdict
from launch.hangs import SuperviseConfig, hang
from launch.restarts import Restarts
from mcl_dist.heartbeat import STEPPING, WAITING, Beat, read_beats

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
LENGTH = ("train.steps=40", "checkpoint.every=4", "checkpoint.keep=99")
QUICK = ("supervise.silent_seconds=4", "supervise.hang_seconds_min=20")
SECONDS = 120


def start(shards: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    words = ["--config", str(REPOSITORY / "configs/pretrain/tiny.yaml"), f"data.train={shards}", f"run.dir={run}"]
    words += [*SMALL, *LENGTH, *QUICK, *more, "--ranks", "2", "--runtime", str(run.with_suffix(".runtime"))]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pretrain", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, output


def rank_at_step(run: Path, step: int, attempt: int = 1) -> int:
    """Wait until rank 1 has done so many steps; its process id."""
    folder, deadline = run.with_suffix(".runtime") / f"attempt-{attempt}", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for beat in read_beats(folder):
            if beat.rank == 1 and beat.step >= step:
                return beat.pid
        time.sleep(0.02)
    raise TimeoutError(f"{folder}: no step {step}")


def weights(run: Path) -> dict[str, object]:
    return load_file(run / "checkpoints" / "step-000000040" / "network.safetensors")


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = finished(start(synthetic_shards, run))
    assert code == 0, output
    return run


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all((mine[name] == theirs[name]).all() for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "killed"), (signal.SIGSTOP, "hang")])
def test_a_run_whose_rank_is_killed_or_halted_comes_back_and_ends_with_the_same_weights(
    synthetic_shards: Path, whole_run: Path, tmp_path: Path, number: signal.Signals, cause: str
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    os.kill(rank_at_step(run, 8), number)
    code, output = finished(process)
    assert code == 0, output
    assert same_weights(run, whole_run)
    (restarted,) = (event for event in events(run) if event["event"] == "Restarted")
    assert restarted["cause"] == cause
    accounts = [event for event in events(run) if event["event"] == "Accounts"][-1]
    assert accounts["restarts"] == {cause: 1}
    assert 0 < accounts["goodput"] < 1


def to_the_supervisor(process: subprocess.Popen[str], rank: int) -> None:  # noqa: ARG001
    process.terminate()


def to_one_rank(process: subprocess.Popen[str], rank: int) -> None:  # noqa: ARG001
    os.kill(rank, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("send", [to_the_supervisor, to_one_rank])
def test_a_run_that_is_asked_to_stop_saves_leaves_with_75_and_goes_on_to_the_same_weights(
    synthetic_shards: Path, whole_run: Path, tmp_path: Path, send: Callable[[subprocess.Popen[str], int], None]
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    send(process, rank_at_step(run, 6))
    code, output = finished(process)
    assert code == 75, output
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"step-{last:09d}" / "COMMITTED").exists()
    if send is to_the_supervisor:
        for folder in run.with_suffix(".runtime").glob("attempt-*"):
            folder.rename(folder.with_name(f"old-{folder.name}"))
        code, output = finished(start(synthetic_shards, run))
        assert code == 0, output
        assert same_weights(run, whole_run)


def beat(rank: int, phase: str = STEPPING, since: float = 0.0, told: float = 100.0, usual: float | None = 0.1) -> Beat:
    return Beat(rank, os.getpid(), 7, phase, since, told, usual)


LIMITS = SuperviseConfig(hang_factor=10, hang_seconds_min=5, silent_seconds=3, pause_seconds=500)


def test_a_step_that_takes_many_times_the_usual_is_a_hang() -> None:
    assert hang([beat(0, since=96)], LIMITS, now=100) is None
    assert "rank 0 has been stepping" in str(hang([beat(0, since=94)], LIMITS, now=100))
    assert hang([beat(0, since=94, usual=1.0)], LIMITS, now=100) is None


def test_a_rank_that_others_wait_for_excuses_them_unless_it_is_silent() -> None:
    assert hang([beat(0), beat(1, WAITING)], LIMITS, now=100) is None
    assert hang([beat(0)], LIMITS, now=100, others_pause=True) is None
    assert "rank 1 gives no sign of life" in str(hang([beat(0), beat(1, WAITING, told=96)], LIMITS, now=100))


def test_restarts_are_bounded_until_there_is_progress() -> None:
    restarts = Restarts(limit=2, progress_steps=10)
    assert [restarts.allow(step) for step in (12, 13, 14)] == [True, True, False]
    assert restarts.allow(24)
    assert restarts.in_a_row == 1


def test_what_a_person_has_to_mend_is_told_before_what_followed_from_it() -> None:
    user, lost = End(1, USER, "no space"), End(1, LOST, "a rank has gone")
    assert verdict({0: lost, 1: user}, [], 1).reason == "rank 1: no space"
    assert not verdict({0: lost, 1: user}, [2], 1).may_be_mended
    assert verdict({0: lost}, [1], 247) == End(1, KILLED, "rank 1 was ended by SIGKILL")
    assert verdict({0: End(75, STOPPED, ""), 1: End(0, DONE, "")}, [], 75).exit_code == 75
    assert {cause for cause in (HUNG, CRASHED) if End(1, cause, "").may_be_mended} == {HUNG, CRASHED}

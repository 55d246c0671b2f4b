"""A run that is hurt or asked to stop, as its user sees it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import NodeSpec
from launch.supervision.hang_detection import SuperviseConfig, hang
from launch.supervision.outcome import CRASHED, DONE, HUNG, KILLED, LOST, STOPPED, USER, Outcome, read_ends, verdict
from launch.supervision.policy import RestartPolicy
from launch.supervision.supervisor import Supervisor
from mcl_dist.distributed.heartbeat import STEPPING, WAITING, Beat, read_beats
from mcl_dist.distributed.shutdown import StopRequest
from tests.support.paths import REPOSITORY
from tests.support.processes import of_run

SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
NO_REPORT = "run.report=false"  # what it costs is another test's matter
LENGTH = ("train.steps=40", "checkpoint.every=4", "checkpoint.keep=99")
QUICK = ("supervise.silent_seconds=4", "supervise.hang_seconds_min=20")
SECONDS = 120


def start(shards: Path, run: Path, terminal: int | None = None) -> subprocess.Popen[str]:
    """The command in a session of its own, whose terminal is the one given."""
    words = ["--config", str(REPOSITORY / "configs/pretrain/tiny.yaml"), f"data.train={shards}", f"run.dir={run}"]
    words += [NO_REPORT, *SMALL, *LENGTH, *QUICK, "--ranks", "2", "--runtime", str(run.with_suffix(".runtime"))]
    session = ["setsid", *(["--ctty"] if terminal else [])]
    return subprocess.Popen(
        [*session, sys.executable, "-m", "launch.cli.main", "pretrain", *words],
        stdin=terminal or subprocess.DEVNULL,
        stdout=terminal or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], run: Path) -> tuple[int, str]:
    """Its exit code and output, once nothing of it is left."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
        assert not of_run(run)
    finally:
        for pid in of_run(run):
            os.kill(pid, signal.SIGKILL)
    return process.returncode, output


def rank_at_step(run: Path, step: int, screen: int | None = None) -> int:
    """Wait until rank 1 has done so many steps, reading what comes on a screen; its process id."""
    folder, deadline = run.with_suffix(".runtime") / "attempt-1", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if screen and select.select([screen], [], [], 0)[0]:
            os.read(screen, 4096)
        for beat in read_beats(folder):
            if beat.rank == 1 and beat.step >= step:
                return beat.pid
        time.sleep(0.02)
    raise TimeoutError(f"{folder}: no step {step}")


def tensors(run: Path) -> dict[str, bytes]:
    """All that the last checkpoint holds: both encoders, statistics, the optimizer's state, the queue."""
    return {file.name: file.read_bytes() for file in (run / "checkpoints/step-000000040").glob("*.safetensors")}


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = finished(start(synthetic_shards, run), run)
    assert code == 0, output
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "killed"), (signal.SIGSTOP, "hang")])
def test_a_run_whose_rank_is_killed_or_halted_comes_back_and_ends_with_the_same_weights(
    synthetic_shards: Path, whole_run: Path, tmp_path: Path, number: signal.Signals, cause: str
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    os.kill(rank_at_step(run, 8), number)
    code, output = finished(process, run)
    assert code == 0, output
    assert tensors(run) == tensors(whole_run)
    (restarted,) = (event for event in events(run) if event["event"] == "Restarted")
    assert restarted["cause"] == cause
    accounts = [event for event in events(run) if event["event"] == "Accounts"][-1]
    assert accounts["restarts"] == {cause: 1}
    assert 0 < accounts["goodput"] < 1


def to_the_supervisor(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    process.terminate()


def to_one_rank(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    os.kill(rank, signal.SIGTERM)


def to_all_groups(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    """As a scheduler does: to the command's process group, and to that of launcher and ranks."""
    for pid in (process.pid, rank):
        os.killpg(os.getpgid(pid), signal.SIGTERM)


def by_a_file(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    (run / "stop").touch()


@pytest.mark.slow
@pytest.mark.parametrize("send", [to_the_supervisor, to_one_rank, to_all_groups, by_a_file])
def test_a_run_that_is_asked_to_stop_saves_leaves_with_75_and_goes_on_to_the_same_weights(
    synthetic_shards: Path, whole_run: Path, tmp_path: Path, send: Callable[[subprocess.Popen[str], int, Path], None]
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    send(process, rank_at_step(run, 6), run)
    code, output = finished(process, run)
    assert code == 75, output
    assert_all_is_saved(run)
    assert not (run / "stop").exists()
    if send is to_the_supervisor:
        for folder in run.with_suffix(".runtime").glob("attempt-*"):
            folder.rename(folder.with_name(f"old-{folder.name}"))
        code, output = finished(start(synthetic_shards, run), run)
        assert code == 0, output
        assert tensors(run) == tensors(whole_run)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_leaves_with_75(synthetic_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    screen, terminal = os.openpty()
    process = start(synthetic_shards, run, terminal)
    os.close(terminal)
    rank_at_step(run, 6, screen=screen)
    os.close(screen)
    code, _ = finished(process, run)
    assert code == 75
    (stopping,) = (event for event in events(run) if event["event"] == "Stopping")
    assert stopping["reason"] == "SIGHUP at rank 0"
    assert_all_is_saved(run)


def assert_all_is_saved(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"step-{last:09d}" / "COMMITTED").exists()


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
    restarts = RestartPolicy(limit=2, progress_steps=10)
    assert [restarts.allow(step) for step in (12, 13, 14)] == [True, True, False]
    assert restarts.allow(24)
    assert restarts.in_a_row == 1


def test_what_a_person_has_to_mend_is_told_before_what_followed_from_it() -> None:
    user, lost = Outcome(1, USER, "no space"), Outcome(1, LOST, "a rank has gone")
    assert verdict({0: lost, 1: user}, [], 1).reason == "rank 1: no space"
    assert not verdict({0: lost, 1: user}, [2], 1).may_be_mended
    assert verdict({0: lost}, [1], 247) == Outcome(1, KILLED, "rank 1 was ended by SIGKILL")
    assert verdict({0: Outcome(75, STOPPED, ""), 1: Outcome(0, DONE, "")}, [], 75).exit_code == 75
    assert {cause for cause in (HUNG, CRASHED) if Outcome(1, cause, "").may_be_mended} == {HUNG, CRASHED}


def leave(work: str, folder: Path) -> tuple[int, Outcome]:
    """How a rank with this work ended: its exit code, and the word that it left for its supervisor."""
    imports = "from launch.supervision.deepspeed_launcher import as_rank; from mcl_dist.errors import *"
    program = f"{imports}; as_rank(lambda: {work})"
    environment = {**os.environ, "MCL_RUNTIME": str(folder), "RANK": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    return result.returncode, read_ends(folder)[1]


@pytest.mark.parametrize(
    ("work", "code", "cause", "attempts"),
    [
        ("(_ for _ in ()).throw(UserError('no space left'))", 1, USER, 1),
        ("(_ for _ in ()).throw(ConfigError('data.crop: too large'))", 2, USER, 1),
        ("False", 75, STOPPED, 1),
        ("True", 0, DONE, 1),
        ("1 / 0", 1, CRASHED, 2),
    ],
)
def test_only_what_another_attempt_may_mend_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, code: int, cause: str, attempts: int
) -> None:
    returned, end = leave(work, tmp_path)
    assert (returned, end.exit_code, end.cause) == (code, code, cause)
    made: list[Outcome | None] = []

    def attempt(self: Supervisor, meeting: NodeSpec, before: Outcome | None) -> tuple[Outcome, int]:  # noqa: ARG001
        made.append(before)
        return end, 5

    monkeypatch.setattr(Supervisor, "_attempt", attempt)
    monkeypatch.setattr(StopRequest, "heed_signals", lambda _: None)
    log = tmp_path / "log.jsonl"
    supervisor = Supervisor("", [], NodeSpec(2), SuperviseConfig(restarts=1), tmp_path, log)
    assert supervisor.run() == end
    assert made == [None, end][:attempts]
    assert log.exists() == (attempts == 2)

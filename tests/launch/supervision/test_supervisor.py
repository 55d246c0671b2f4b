"""Runs that fail or are asked to stop: what their users see, and when the supervisor restarts them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.supervision.deepspeed_launcher import RESTARTED, NodeSpec
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.outcome import CRASHED, DONE, STOPPED, USER
from launch.supervision.processes import wait_until
from launch.supervision.supervisor import Supervisor
from mcl_dist.distributed.heartbeat import read_beats
from mcl_dist.distributed.shutdown import SIGNALS
from tests.support.paths import REPOSITORY
from tests.support.processes import pids_of_run

SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
NO_REPORT = "run.report=false"  # another test measures its cost
LENGTH = ("train.steps=40", "checkpoint.every=4", "checkpoint.keep=99")
QUICK = ("supervise.silent_seconds=4", "supervise.hang_seconds_min=20")
SECONDS = 120


def start(shards: Path, run: Path, terminal: int | None = None) -> subprocess.Popen[str]:
    """Start the command in a new session, with the given terminal."""
    arguments = ["--config", str(REPOSITORY / "configs/pretrain/tiny.yaml"), f"data.train={shards}", f"run.dir={run}"]
    arguments += [NO_REPORT, *SMALL, *LENGTH, *QUICK, "--ranks", "2", "--runtime", str(run.with_suffix(".runtime"))]
    session = ["setsid", *(["--ctty"] if terminal else [])]
    return subprocess.Popen(
        [*session, sys.executable, "-m", "launch.cli.main", "pretrain", *arguments],
        stdin=terminal or subprocess.DEVNULL,
        stdout=terminal or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], run: Path) -> tuple[int, str]:
    """Wait for the command; returns its exit code and output, and checks that no process is left."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
        assert not pids_of_run(run)
    finally:
        for pid in pids_of_run(run):
            os.kill(pid, signal.SIGKILL)
    return process.returncode, output


def pid_at_step(run: Path, step: int, screen: int | None = None) -> int:
    """Wait until rank 1 has done so many steps, reading the screen meanwhile; returns the rank's process id."""
    folder = run.with_suffix(".runtime") / "attempt-1"

    def find() -> int:
        if screen and select.select([screen], [], [], 0)[0]:
            os.read(screen, 4096)
        return next((beat.pid for beat in read_beats(folder) if beat.rank == 1 and beat.step >= step), 0)

    pid = wait_until(find, SECONDS)
    assert pid, f"{folder}: no step {step}"
    return pid


def tensors(run: Path) -> dict[str, bytes]:
    """All tensors of the last checkpoint: both encoders, statistics, the optimizer's state, the queue."""
    return {file.name: file.read_bytes() for file in (run / "checkpoints/step-000000040").glob("*.safetensors")}


def events(run: Path, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def assert_last_step_is_saved(run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"step-{last:09d}" / "COMMITTED").exists()


@pytest.fixture(scope="module")
def undisturbed_run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = finish(start(synthetic_shards, run), run)
    assert code == 0, output
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "killed"), (signal.SIGSTOP, "hang")])
def test_a_run_whose_rank_is_killed_or_stopped_restarts_and_ends_with_the_same_weights(
    synthetic_shards: Path, undisturbed_run: Path, tmp_path: Path, number: signal.Signals, cause: str
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    os.kill(pid_at_step(run, 8), number)
    code, output = finish(process, run)
    assert code == 0, output
    assert tensors(run) == tensors(undisturbed_run)
    (restarted,) = events(run, "Restarted")
    assert restarted["cause"] == cause
    accounts = events(run, "Accounts")[-1]
    assert accounts["restarts"] == {cause: 1}
    assert 0 < accounts["goodput"] < 1


def to_supervisor(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    process.terminate()


def to_one_rank(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    os.kill(rank, signal.SIGTERM)


def to_all_groups(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    """As a scheduler: to the process groups of the command and of the ranks."""
    for pid in (process.pid, rank):
        os.killpg(os.getpgid(pid), signal.SIGTERM)


def by_stop_file(process: subprocess.Popen[str], rank: int, run: Path) -> None:  # noqa: ARG001
    (run / "stop").touch()


@pytest.mark.slow
@pytest.mark.parametrize("request_stop", [to_supervisor, to_one_rank, to_all_groups, by_stop_file])
def test_a_run_that_is_asked_to_stop_saves_exits_with_75_and_resumes_to_the_same_weights(
    synthetic_shards: Path,
    undisturbed_run: Path,
    tmp_path: Path,
    request_stop: Callable[[subprocess.Popen[str], int, Path], None],
) -> None:
    run = tmp_path / "run"
    process = start(synthetic_shards, run)
    request_stop(process, pid_at_step(run, 6), run)
    code, output = finish(process, run)
    assert code == 75, output
    assert_last_step_is_saved(run)
    assert not (run / "stop").exists()
    if request_stop is to_supervisor:
        for folder in run.with_suffix(".runtime").glob("attempt-*"):
            folder.rename(folder.with_name(f"old-{folder.name}"))
        code, output = finish(start(synthetic_shards, run), run)
        assert code == 0, output
        assert tensors(run) == tensors(undisturbed_run)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_exits_with_75(synthetic_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    screen, terminal = os.openpty()
    process = start(synthetic_shards, run, terminal)
    os.close(terminal)
    pid_at_step(run, 6, screen=screen)
    os.close(screen)
    code, _ = finish(process, run)
    assert code == 75
    (stopping,) = events(run, "Stopping")
    assert stopping["reason"] == "SIGHUP at rank 0"
    assert_last_step_is_saved(run)


# In place of the DeepSpeed launcher: writes the outcome of rank 1, and the cause of the restart.
LAUNCHER = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["MCL_RUNTIME"])
(folder / "cause").write_text(os.environ.get("MCL_RESTARTED", "none"))
(folder / "rank-00001.end").write_text(sys.argv[2])
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Restore this process's handlers, which a supervisor replaces."""
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("cause", "code", "num_attempts"), [(USER, 1, 1), (USER, 2, 1), (STOPPED, 75, 1), (DONE, 0, 1), (CRASHED, 1, 2)]
)
def test_only_a_retryable_outcome_restarts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str, code: int, num_attempts: int
) -> None:
    written = json.dumps({"exit_code": code, "cause": cause, "reason": "so it went"})
    command = [sys.executable, "-c", LAUNCHER, str(code), written]
    monkeypatch.setattr("launch.supervision.supervisor.launcher_command", lambda *_: command)
    monkeypatch.delenv(RESTARTED, raising=False)
    event_log = tmp_path / "log.jsonl"
    outcome = Supervisor("", [], NodeSpec(2), SuperviseConfig(restarts=1), tmp_path, event_log).run()
    assert (outcome.exit_code, outcome.cause, outcome.reason) == (code, cause, "rank 1: so it went")
    causes = [(tmp_path / f"attempt-{number + 1}" / "cause").read_text() for number in range(num_attempts)]
    restart = json.dumps({"cause": cause, "reason": "rank 1: so it went", "attempt": 1})
    assert causes == ["none", restart][:num_attempts]
    assert len(list(tmp_path.glob("attempt-*"))) == num_attempts
    assert event_log.exists() == (num_attempts == 2)

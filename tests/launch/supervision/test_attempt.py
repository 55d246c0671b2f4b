"""An attempt with a small program in place of the DeepSpeed launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch.supervision import attempt as attempt_module
from launch.supervision.attempt import Attempt
from launch.supervision.deepspeed_launcher import RUNTIME
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.outcome import DONE, HUNG, KILLED, STOPPED, Outcome
from launch.supervision.processes import session_members, wait_until
from mcl_dist.distributed.heartbeat import read_beats

SECONDS = 20.0
# Starts a process for each program; when one fails, stops the others and exits with its code, as DeepSpeed's launcher.
LAUNCHER = """
import json, os, subprocess, sys
programs = json.loads(sys.argv[1])
ranks = [subprocess.Popen([sys.executable, "-c", program, str(rank)]) for rank, program in enumerate(programs)]
code = 0
for _ in ranks:
    code = code or os.waitstatus_to_exitcode(os.wait()[1])
    for rank in ranks if code else []:
        rank.poll() is None and rank.terminate()
sys.exit(code % 256)
"""
RANK = """
import os, signal, sys
from pathlib import Path
from launch.supervision.outcome import Outcome
from mcl_dist.distributed.heartbeat import Heartbeat
def leave(code, cause):
    Outcome(code, cause, "by itself").write(folder, rank)
    os._exit(code)
rank, folder = int(sys.argv[1]), Path(os.environ["MCL_RUNTIME"])
heartbeat = Heartbeat(folder, rank)
"""
SUCCEED = RANK + "heartbeat.start_step(7); heartbeat.beat(); leave(0, 'done')"
STEP = RANK + "heartbeat.enter_phase('stepping'); heartbeat.start(); "
RUN = STEP + "signal.pause()"
LOSE_THE_OTHERS = RANK + "signal.signal(signal.SIGTERM, lambda *_: leave(1, 'lost')); heartbeat.start(); signal.pause()"
STOP = RANK + "signal.signal(signal.SIGUSR1, lambda *_: leave(75, 'stopped')); heartbeat.start(); signal.pause()"
FALL_SILENT = RANK + "heartbeat.beat(); signal.pause()"
NEVER_BEAT = "import signal; signal.pause()"
LIMITS = SuperviseConfig()
Start = Callable[..., Attempt]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    attempts = []

    def start_attempt(*programs: str, limits: SuperviseConfig = LIMITS, launcher: str = LAUNCHER) -> Attempt:
        command = [sys.executable, "-c", launcher, json.dumps(programs)]
        attempts.append(Attempt.start(command, {**os.environ, RUNTIME: str(tmp_path)}, tmp_path, len(programs), limits))
        return attempts[-1]

    yield start_attempt
    for attempt in attempts:
        attempt.kill()


def outcome_of(attempt: Attempt) -> Outcome | None:
    """The outcome, once no process is left."""
    outcome = wait_until(attempt.poll, SECONDS)
    assert session_members(attempt.launcher.pid) == []
    return outcome


def rank_pid(attempt: Attempt, rank: int) -> int:
    def find() -> list[int]:
        beats = read_beats(attempt.folder)
        return [beat.pid for beat in beats if beat.rank == rank and len(beats) == attempt.num_ranks]

    return wait_until(find, SECONDS)[0]


def test_an_attempt_whose_ranks_succeed_is_done(start: Start) -> None:
    attempt = start(SUCCEED, SUCCEED)
    outcome = outcome_of(attempt)
    assert outcome is not None
    assert (outcome.exit_code, outcome.cause, attempt.step) == (0, DONE, 7)


def test_a_killed_rank_explains_the_attempt_though_the_others_lose_it(start: Start) -> None:
    attempt = start(LOSE_THE_OTHERS, RUN)
    os.kill(rank_pid(attempt, 1), signal.SIGKILL)
    assert outcome_of(attempt) == Outcome(1, KILLED, "rank 1 was killed by SIGKILL")


def test_a_launcher_that_outlives_its_rank_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "EXIT_CODE_SECONDS", 0.0)
    attempt = start(RUN, launcher=LAUNCHER.replace("code = 0", "import signal; signal.pause()"))
    os.kill(rank_pid(attempt, 0), signal.SIGKILL)
    assert outcome_of(attempt) == Outcome(1, KILLED, "rank 0 was killed by SIGKILL")


def test_a_rank_without_a_heartbeat_hangs(start: Start) -> None:
    outcome = outcome_of(start(FALL_SILENT, limits=replace(LIMITS, silent_seconds=0.1)))
    assert outcome is not None
    assert (outcome.exit_code, outcome.cause) == (1, HUNG)
    assert outcome.reason.startswith("rank 0 has sent no heartbeat for ")


def test_a_rank_that_never_starts_hangs(start: Start) -> None:
    outcome = outcome_of(start(NEVER_BEAT, limits=replace(LIMITS, pause_seconds=0.1)))
    assert outcome is not None
    assert (outcome.exit_code, outcome.cause) == (1, HUNG)
    assert outcome.reason.startswith("1 ranks have not started within ")


def test_ranks_that_are_asked_to_stop_end_the_attempt(start: Start) -> None:
    attempt = start(STOP, STOP)
    rank_pid(attempt, 0)
    attempt.request_stop(signal.SIGUSR1)
    outcome = outcome_of(attempt)
    assert outcome is not None
    assert (outcome.exit_code, outcome.cause) == (75, STOPPED)


def test_an_attempt_is_in_a_slow_phase_until_all_ranks_step(start: Start) -> None:
    attempt = start(RUN)
    assert attempt.in_slow_phase()
    assert wait_until(lambda: not attempt.in_slow_phase(), SECONDS)

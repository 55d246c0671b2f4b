"""Goodput of runs and restarts, with simulated time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mcl_dist.events import Accounts, CheckpointWritten, Event, Finished, Restarted, Started, StepDone, Stopping
from mcl_dist.run_log.goodput import GoodputTracker, StartInfo
from mcl_dist.run_log.listeners import EventLog, MetricsFile

STEPS, STEP_SECONDS = 6, 2.0


@dataclass
class Run:
    """A run that can restart in its folder; `now` is the simulated time."""

    folder: Path
    now: float = 100.0
    events: list[Event] = field(default_factory=list)

    def start(self, step: int, startup_seconds: float = 10.0, cause: str = "") -> None:
        """Start from the checkpoint of a step."""
        restart = {"cause": cause, "reason": "rank 1 was ended by SIGKILL", "attempt": 1} if cause else {}
        start_info = StartInfo(self.now, **restart)
        self.now += startup_seconds
        files = [EventLog(self.folder / "log.jsonl"), MetricsFile(self.folder / "metrics.jsonl")]
        tracker = GoodputTracker(self.folder, [*files, self.events.append], start_info, now=lambda: self.now)
        self.listeners = [*files, tracker]
        self.emit(Started(step, STEPS, None))

    def train(self, first: int, last: int, *, taken: bool = True) -> None:
        """Do the steps `first` to `last`, both included."""
        for step in range(first, last + 1):
            self.now += STEP_SECONDS
            self.emit(StepDone(step, 0, STEPS, {"loss": 1.0}, 0.1, 4, STEP_SECONDS, 0.0, taken=taken))

    def save(self, step: int, stall: float) -> None:
        """Write a checkpoint that blocks training for `stall` seconds."""
        self.now += stall
        self.emit(CheckpointWritten(step, "somewhere", stall, stall, 1))

    def emit(self, event: Event) -> None:
        """Pass an event to all listeners."""
        for listener in self.listeners:
            listener(event)

    def last(self, kind: type[Event]) -> Event:
        """The newest event of a kind from the tracker."""
        return [event for event in self.events if isinstance(event, kind)][-1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(tmp_path)
    monkeypatch.setattr(time, "time", lambda: run.now)
    return run


def test_an_undisturbed_run_loses_startup_checkpoints_and_skipped_steps(run: Run) -> None:
    run.start(0)
    run.train(1, 5)
    run.save(5, stall=3.0)
    run.train(6, 6, taken=False)
    run.emit(Finished(STEPS, 0))
    lost = {"starting": 10.0, "checkpoint": 3.0, "skipped": 2.0, "other": 0.0}
    assert run.last(Accounts) == Accounts(10 / 25, 25.0, 10.0, lost, {})


def test_a_checkpoints_stall_is_counted_once(run: Run) -> None:
    run.start(0)
    run.now += 3.0
    run.emit(StepDone(1, 0, STEPS, {"loss": 1.0}, 0.1, 4, 3.0, 0.0, phases={"forward": 2.0, "checkpoint": 1.0}))
    run.emit(CheckpointWritten(1, "somewhere", 2.0, stall_seconds=1.0, bytes=1))
    run.emit(Finished(STEPS, 0))
    accounts = run.last(Accounts)
    assert isinstance(accounts, Accounts)
    assert (accounts.productive_seconds, accounts.lost_seconds["checkpoint"]) == (2.0, 1.0)


def test_repeated_steps_count_once_and_lost_time_has_its_cause(run: Run) -> None:
    run.start(0)
    run.train(1, 2)
    run.save(2, stall=0.5)
    run.train(3, 4)
    run.now += 11.5
    run.start(2, cause="killed")
    restarted = run.last(Restarted)
    assert restarted == Restarted(
        "killed", 1, 26.0, "rank 1 was ended by SIGKILL", 2
    )  # since step 2, including its checkpoint
    run.train(3, 6)
    run.emit(Finished(STEPS, 0))
    lost = {"starting": 10.0, "killed": 26.0, "other": 0.0}
    assert run.last(Accounts) == Accounts(12 / 48, 48.0, 12.0, lost, {"killed": 1})


def test_two_restarts_from_one_checkpoint_lose_no_second_twice(run: Run) -> None:
    run.start(0)
    run.train(1, 4)
    for cause in ("killed", "hang"):
        run.now += 10.0
        run.start(2, cause=cause)
        run.train(3, 4)
    accounts = run.last(Accounts)
    assert accounts.restarts == {"killed": 1, "hang": 1}
    assert accounts.productive_seconds == 4.0
    assert accounts.lost_seconds == {"starting": 10.0, "hang": accounts.wall_seconds - 14.0, "other": 0.0}


def test_a_manual_restart_has_its_cause_from_the_end_of_the_previous_run(run: Run) -> None:
    run.start(0)
    run.train(1, 2)
    run.emit(Stopping(2, "SIGTERM at rank 0"))
    run.now += 90.0
    run.start(2)
    assert (run.last(Restarted).cause, run.last(Restarted).lost_seconds) == ("stopped", 100.0)
    assert run.last(Restarted).reason == "the previous run stopped"
    run.train(3, 3)
    run.start(2)
    assert (run.last(Restarted).cause, run.last(Restarted).reason) == ("outage", "an unexpected exit")
    assert run.last(Accounts).restarts == {"stopped": 1, "outage": 1}


def test_incomplete_lines_from_a_full_disk_do_not_prevent_a_restart(run: Run) -> None:
    run.start(0)
    run.train(1, 2)
    log = run.folder / "log.jsonl"
    log.write_text(log.read_text() + '{"time": 1.0, "event": "Che{"time": 2.0, "event": "Started", "step": 1}\n{"ti')
    run.start(2, cause="error")
    run.train(3, 6)
    run.emit(Finished(STEPS, 0))
    accounts = run.last(Accounts)
    assert isinstance(accounts, Accounts)
    assert accounts.restarts == {"error": 1}
    assert accounts.productive_seconds == 12.0

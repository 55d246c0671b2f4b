"""Goodput of a run over all its restarts, computed from the run's own files; no other state is stored.

Wall time counts from the first start. The seconds of counted steps are productive; all other time is lost to a cause.
A restart costs the time since the run first reached the step it resumes from: repeated steps, downtime and startup.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcl_dist.events import (
    Accounts,
    CheckpointWritten,
    Evaluated,
    Event,
    Failed,
    Finished,
    Listener,
    Restarted,
    Started,
    StepDone,
    Stopping,
    emit,
)
from mcl_dist.storage import jsonl

REPORT_SECONDS = 20.0  # a one-minute rate, the shortest on the dashboards, always covers two reports
RESTART_CAUSES = ("killed", "error", "hang", "lost", "stopped", "outage", "finished")
CAUSE_OF_EXIT = {"Stopping": "stopped", "Finished": "finished"}


@dataclass(frozen=True)
class LostTime:
    """Seconds lost to `cause` after `step` steps; if the run goes back to a step, the restart's loss replaces it."""

    step: int
    cause: str
    seconds: float


@dataclass(frozen=True)
class StartInfo:
    """Begin of this start in Unix seconds, and, after a restart by the supervisor, its cause and attempt."""

    began: float
    cause: str = ""
    reason: str = ""
    attempt: int = 0


class GoodputTracker:
    """A listener that emits `Restarted` and `Accounts`; it must receive `Started` after the listeners of the files.

    Args:
        folder: the run folder, with `log.jsonl` and `metrics.jsonl`.
        listeners: receive the emitted events.
        start_info: of this start.
        now: returns Unix seconds.
    """

    def __init__(
        self, folder: Path, listeners: Sequence[Listener], start_info: StartInfo, now: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._listeners = listeners
        self._start_info = start_info
        self._first_start = start_info.began
        self._now = now
        self._productive = 0.0
        self._losses: list[LostTime] = []
        self._restarts: Counter[str] = Counter()
        self._reported_at = now()

    def __call__(self, event: Event) -> None:
        """Account for an event."""
        match event:
            case Started(step):
                self._start(step)
            case StepDone():
                self._add_step(event.step, event.seconds, event.phases, taken=event.taken)
                if self._now() - self._reported_at >= REPORT_SECONDS:
                    self._report()
            case CheckpointWritten():
                self._losses.append(LostTime(event.step, "checkpoint", event.stall_seconds))
            case Evaluated():
                self._losses.append(LostTime(event.step, "evaluation", event.seconds))
            case Stopping() | Finished() | Failed():
                self._report()

    def _start(self, step: int) -> None:
        """Account for all earlier starts, and for the cost of this start from `step`."""
        now = self._now()
        log = jsonl.read(self._folder / "log.jsonl")
        earlier_starts = [record for record in log if record["event"] == "Started"][:-1]  # the last is this start
        self._restore_first_start(log)
        reached = self._replay_steps(step, default=earlier_starts[0]["time"] if earlier_starts else now)
        for record in log:
            self._replay(record)
        if earlier_starts:
            cause, reason, attempt = self._restart_cause(log)
            lost = max(0.0, now - reached)
            self._losses.append(LostTime(step, cause, lost))
            self._restarts[cause] += 1
            emit(self._listeners, Restarted(cause, attempt, lost, reason, step))
        else:
            self._losses.append(LostTime(-1, "starting", now - self._first_start))
        self._report()

    def _restore_first_start(self, log: Sequence[jsonl.Record]) -> None:
        accounts = next((record for record in log if record["event"] == "Accounts"), None)
        if accounts is not None:
            self._first_start = accounts["time"] - accounts["wall_seconds"]
            self._losses.append(LostTime(-1, "starting", accounts["lost_seconds"]["starting"]))

    def _replay_steps(self, step: int, default: float) -> float:
        """Account for the steps that still count; returns the time at which `step` was reached."""
        reached = default
        for record in jsonl.read(self._folder / "metrics.jsonl"):
            self._add_step(record["step"], record["seconds"], record.get("phases", {}), taken=record["taken"])
            if record["step"] == step:
                reached = record["time"]
        return reached

    def _replay(self, record: jsonl.Record) -> None:
        match record["event"]:
            case "Started":
                self._losses = [x for x in self._losses if x.step < record["step"] or x.cause == "skipped"]
            case "Restarted":
                self._losses.append(LostTime(record["step"], record["cause"], record["lost_seconds"]))
                self._restarts[record["cause"]] += 1
            case "CheckpointWritten":
                seconds: float = record["seconds"]  # of records without a stall
                self._losses.append(LostTime(record["step"], "checkpoint", record.get("stall_seconds", seconds)))
            case "Evaluated":
                self._losses.append(LostTime(record["step"], "evaluation", record["seconds"]))

    def _restart_cause(self, log: Sequence[jsonl.Record]) -> tuple[str, str, int]:
        """Cause, reason and attempt: from the supervisor, or for a manual start from the end of the previous one."""
        if self._start_info.cause:
            return self._start_info.cause, self._start_info.reason, self._start_info.attempt
        previous = [record["event"] for record in log if record["event"] in (*CAUSE_OF_EXIT, "Started")][:-1]
        cause = CAUSE_OF_EXIT.get(previous[-1], "outage") if previous else "outage"
        return cause, "an unexpected exit" if cause == "outage" else f"the previous run {cause}", 0

    def _add_step(self, step: int, seconds: float, phases: Mapping[str, float], *, taken: bool) -> None:
        seconds -= phases.get("checkpoint", 0.0)  # `CheckpointWritten` accounts for it as its stall
        if taken:
            self._productive += seconds
        else:
            self._losses.append(LostTime(step, "skipped", seconds))

    def _report(self) -> None:
        now = self._reported_at = self._now()
        wall = max(now - self._first_start, 1e-9)
        lost: defaultdict[str, float] = defaultdict(float)
        for loss in self._losses:
            lost[loss.cause] += loss.seconds
        lost["other"] = max(0.0, wall - self._productive - sum(lost.values()))
        ratio = min(1.0, self._productive / wall)
        emit(self._listeners, Accounts(ratio, wall, self._productive, dict(lost), dict(self._restarts)))

"""Folds the records of a run's `metrics.jsonl` and `log.jsonl` into its view, in bounded memory."""

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from monitoring.history.curves import Curves
from monitoring.history.messages import Record, event_message
from monitoring.history.run_view import (
    VERSION,
    Checkpoint,
    Message,
    RankView,
    RunView,
    active_warnings,
    known_median,
    stall_timeout,
)

NUM_MESSAGES = 50
EXIT_SECONDS = 5.0  # without a record, and with the lock free, after which the run counts as stopped
STATES = {
    "Started": "starting",
    "Evaluating": "evaluating",
    "Evaluated": "running",
    "Stopping": "stopping",
    "Finished": "finished",
    "Failed": "failed",
}
STATES_BEFORE_STEPS = ("waiting", "starting", "evaluating")
PHASE = "phase:"  # prefix of a phase among the values of a step
NOT_VALUES = ("time", "step", "epoch", "taken", "phases")
COUNTERS = {
    "Started": "starts",
    "StepSkipped": "skipped",
    "LossSpike": "spikes",
    "CheckpointFailed": "checkpoints_failed",
}
STREAKS = {
    "StepSkipped": "skipped_in_a_row",
    "CheckpointFailed": "checkpoints_failed_in_a_row",
    "CheckpointWritten": "checkpoints_failed_in_a_row",
}
COUNTS = (*COUNTERS.values(), *STREAKS.values())


class History:
    """Accumulates a run's records one by one and returns the resulting view."""

    def __init__(self, run: str, source: str) -> None:
        self._run, self._source = run, source
        self._curves = Curves()
        self._evaluations = Curves()
        self._messages: deque[Message] = deque(maxlen=NUM_MESSAGES)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._state, self._why = "waiting", "no event yet"
        self._step = 0
        self._epoch: int | None = None
        self._total_steps: int | None = None
        self._started: float | None = None
        self._updated: float | None = None
        self._latest: dict[str, float | None] = {}
        self._checkpoint: Checkpoint | None = None
        self._reports: dict[int, Record] = {}
        self._restarts: dict[str, int] = {}
        self._goodput: float | None = None

    def add_step(self, record: Record) -> None:
        """Add a record of `metrics.jsonl`."""
        values = {name: value for name, value in record.items() if name not in NOT_VALUES}
        values |= {PHASE + name: value for name, value in record.get("phases", {}).items()}
        self._step, self._epoch, self._updated = record["step"], record["epoch"], record.get("time")
        self._latest = values
        self._curves.append(record["step"], record.get("time"), values)
        if self._state in STATES_BEFORE_STEPS:
            self._state, self._why = "running", ""
        if record.get("taken", True):
            self._counts["skipped_in_a_row"] = 0

    def add_event(self, record: Record, rank: int = 0) -> None:
        """Add a record of a rank's log; only loader reports count from ranks other than the first."""
        if record["event"] == "LoaderReport":
            self._reports[rank] = record
        elif rank == 0:
            self._add_first_rank_event(record)

    def view(self, *, alive: bool | None = True) -> RunView:
        """The current view; `alive`: whether the run's process exists, None if unknown."""
        whole, recent, now = self._curves.whole(), self._curves.recent(), time.time()
        step_seconds = known_median(recent["values"].get("seconds", []))
        state, why = self._state_at(now, alive, step_seconds)
        left = max(0, self._total_steps - self._step) if self._total_steps is not None else None
        view = RunView(
            version=VERSION,
            run=self._run,
            source=self._source,
            now=now,
            started=self._started,
            updated=self._updated,
            state=state,
            why=why,
            step=self._step,
            total_steps=self._total_steps,
            epoch=self._epoch,
            seconds_left=None if left is None or step_seconds is None else left * step_seconds,
            latest=dict(self._latest),
            phases=_means(recent["values"]),
            whole=whole,
            recent=recent,
            evaluations=self._evaluations.whole(),
            counts=dict(self._counts),
            checkpoint=self._checkpoint,
            loader=_loader_totals(self._reports),
            ranks=[_rank_view(rank, report, self._started) for rank, report in sorted(self._reports.items())],
            restarts=dict(self._restarts),
            goodput=self._goodput,
            warnings=[],
            messages=list(self._messages),
        )
        view["warnings"] = active_warnings(view)
        return view

    def _state_at(self, now: float, alive: bool | None, step_seconds: float | None) -> tuple[str, str]:
        if self._state in ("finished", "failed", "waiting"):
            return self._state, self._why
        times = [moment for moment in (self._started, self._updated) if moment is not None]
        idle_seconds = now - max(times) if times else 0.0
        if alive is False and idle_seconds > EXIT_SECONDS:
            reason = self._why if self._state == "stopping" else ""
            return "stopped", reason or "the process exited unexpectedly"
        if self._state == "running" and idle_seconds > stall_timeout(step_seconds):
            return "stalled", f"no step for {idle_seconds:.0f} s"
        return self._state, self._why

    def _add_first_rank_event(self, record: Record) -> None:
        if message := event_message(record):
            self._messages.append(message)
        name = record["event"]
        if name in STATES:
            self._state, self._why = STATES[name], record.get("reason", "")
        self._count(name, record)
        match name:
            case "Started":
                self._started, self._step, self._total_steps = record["time"], record["step"], record["total_steps"]
                self._reports.clear()
                self._evaluations.rewind(record["step"] + 1)
            case "CheckpointWritten":
                self._checkpoint = _checkpoint(record)
            case "Evaluating":
                self._why = f"{record['done']:,} of {record['videos']:,} videos of a set, on the first rank"
            case "Evaluated":
                values = {**record["scores"], "seconds": record["seconds"]}
                self._evaluations.append(record["step"], record["time"], values)
            case "Restarted":
                self._restarts[record["cause"]] = self._restarts.get(record["cause"], 0) + 1
            case "Accounts":
                self._goodput, self._restarts = record["goodput"], dict(record["restarts"])
            case "Finished":
                self._step = record["step"]

    def _count(self, name: str, record: Record) -> None:
        if name in COUNTERS:
            self._counts[COUNTERS[name]] += 1
        if name in STREAKS:
            self._counts[STREAKS[name]] = record.get("in_a_row", 0)


def _checkpoint(record: Record) -> Checkpoint:
    return Checkpoint(
        step=record["step"],
        time=record["time"],
        seconds=record["seconds"],
        stall_seconds=record.get("stall_seconds"),
        bytes=record.get("bytes"),
    )


def _means(values: Mapping[str, list[float | None]]) -> dict[str, float]:
    """Mean seconds of each phase over the newest steps."""
    means = {}
    for name, column in values.items():
        known = [value for value in column if value is not None]
        if name.startswith(PHASE) and known:
            means[name.removeprefix(PHASE)] = sum(known) / len(known)
    return means


def _loader_totals(reports: Mapping[int, Record]) -> dict[str, Any] | None:
    """Totals of the ranks' loader reports."""
    if not reports:
        return None
    newest = reports.values()
    totals: dict[str, Any] = {
        name: sum(report[name] for report in newest) for name in ("expected", "delivered", "replaced", "queue")
    }
    totals["unaccounted"] = totals["expected"] - totals["delivered"] - totals["replaced"]
    totals["bad_samples"] = _by_reason(report["bad_samples"] for report in newest)
    totals["retries"] = _by_reason(report["storage"].get("retries", {}) for report in newest)
    for name in ("cache_hits", "cache_misses", "bytes_read"):
        totals[name] = sum(report["storage"].get(name, 0) for report in newest)
    return totals


def _by_reason(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Totals of the ranks' counts by reason, without zeros."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: number for reason, number in total.most_common() if number}


def _rank_view(rank: int, report: Record, started: float | None) -> RankView:
    seconds = report["time"] - started if started is not None else 0.0
    return RankView(
        rank=rank,
        node="",
        time=report["time"],
        step=None,
        step_seconds=None,
        wait_ratio=report["waited_seconds"] / seconds if seconds > 0 else None,
        queue=report["queue"],
        bad_samples=sum(report["bad_samples"].values()),
        retries=sum(report["storage"].get("retries", {}).values()),
    )

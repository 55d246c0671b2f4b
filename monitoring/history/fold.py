"""A run's own history, folded in bounded memory from the lines of its `metrics.jsonl` and `log.jsonl`."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from monitoring.history.curves import Curves
from monitoring.history.messages import message
from monitoring.history.run_view import VERSION, Checkpoint, Message, RankView, RunView, quiet_limit, usual, warnings_of

NUM_MESSAGES = 50
GONE_SECONDS = 5.0  # without news before a lock that nobody holds says that the run is gone
STATES = {
    "Started": "starting",
    "Evaluating": "evaluating",
    "Evaluated": "running",
    "Stopping": "stopping",
    "Finished": "finished",
    "Failed": "failed",
}
UNTIL_A_STEP = ("waiting", "starting", "evaluating")
PHASE = "phase:"  # in front of a phase's name among a step's figures
NO_FIGURES = ("time", "step", "epoch", "taken", "phases")
COUNTED = {
    "Started": "starts",
    "StepSkipped": "skipped",
    "LossSpike": "spikes",
    "CheckpointFailed": "checkpoints_failed",
}
IN_A_ROW = {
    "StepSkipped": "skipped_in_a_row",
    "CheckpointFailed": "checkpoints_failed_in_a_row",
    "CheckpointWritten": "checkpoints_failed_in_a_row",
}
COUNTS = (*COUNTED.values(), *IN_A_ROW.values())


class History:
    """Takes a run's lines one by one, and tells what they come to."""

    def __init__(self, run: str, source: str) -> None:
        self._run, self._source = run, source
        self._curves = Curves()
        self._evaluations = Curves()
        self._messages: deque[Message] = deque(maxlen=NUM_MESSAGES)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._state, self._why = "waiting", "nothing has been told yet"
        self._step = 0
        self._epoch: int | None = None
        self._total_steps: int | None = None
        self._started: float | None = None
        self._updated: float | None = None
        self._latest: dict[str, float | None] = {}
        self._checkpoint: Checkpoint | None = None
        self._reports: dict[int, Mapping[str, Any]] = {}
        self._restarts: dict[str, int] = {}
        self._goodput: float | None = None

    def take_step(self, line: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl`."""
        figures = {name: value for name, value in line.items() if name not in NO_FIGURES}
        figures |= {PHASE + name: value for name, value in line.get("phases", {}).items()}
        self._step, self._epoch, self._updated = line["step"], line["epoch"], line.get("time")
        self._latest = figures
        self._curves.append(line["step"], line.get("time"), figures)
        if self._state in UNTIL_A_STEP:
            self._state, self._why = "running", ""
        if line.get("taken", True):
            self._counts["skipped_in_a_row"] = 0

    def take_event(self, line: Mapping[str, Any], rank: int = 0) -> None:
        """Add a line of a rank's log; of other ranks than the first only what feeds them is heard."""
        if line["event"] == "LoaderReport":
            self._reports[rank] = line
        elif rank == 0:
            self._hear(line)

    def view(self, *, alive: bool | None = True) -> RunView:
        """The run now; `alive` says whether its process still is, none where that cannot be known."""
        whole, recent, now = self._curves.whole(), self._curves.recent(), time.time()
        step_seconds = usual(recent["values"].get("seconds", []))
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
            loader=_fed(self._reports),
            ranks=[_rank(rank, report, self._started) for rank, report in sorted(self._reports.items())],
            restarts=dict(self._restarts),
            goodput=self._goodput,
            warnings=[],
            messages=list(self._messages),
        )
        view["warnings"] = warnings_of(view)
        return view

    def _state_at(self, now: float, alive: bool | None, step_seconds: float | None) -> tuple[str, str]:
        if self._state in ("finished", "failed", "waiting"):
            return self._state, self._why
        heard = [moment for moment in (self._started, self._updated) if moment is not None]
        quiet = now - max(heard) if heard else 0.0
        if alive is False and quiet > GONE_SECONDS:
            said = self._why if self._state == "stopping" else ""
            return "stopped", said or "its process is gone without a word"
        if self._state == "running" and quiet > quiet_limit(step_seconds):
            return "stalled", f"no step for {quiet:.0f} s"
        return self._state, self._why

    def _hear(self, line: Mapping[str, Any]) -> None:
        if told := message(line):
            self._messages.append(told)
        name = line["event"]
        if name in STATES:
            self._state, self._why = STATES[name], line.get("reason", "")
        self._count(name, line)
        match name:
            case "Started":
                self._started, self._step, self._total_steps = line["time"], line["step"], line["total_steps"]
                self._reports.clear()
                self._evaluations.rewind(line["step"] + 1)
            case "CheckpointWritten":
                self._checkpoint = _checkpoint(line)
            case "Evaluating":
                self._why = f"{line['done']:,} of {line['videos']:,} videos of a set, on the first rank"
            case "Evaluated":
                figures = {**line["scores"], "seconds": line["seconds"]}
                self._evaluations.append(line["step"], line["time"], figures)
            case "Restarted":
                self._restarts[line["cause"]] = self._restarts.get(line["cause"], 0) + 1
            case "Accounts":
                self._goodput, self._restarts = line["goodput"], dict(line["restarts"])
            case "Finished":
                self._step = line["step"]

    def _count(self, name: str, line: Mapping[str, Any]) -> None:
        if name in COUNTED:
            self._counts[COUNTED[name]] += 1
        if name in IN_A_ROW:
            self._counts[IN_A_ROW[name]] = line.get("in_a_row", 0)


def _checkpoint(line: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        step=line["step"],
        time=line["time"],
        seconds=line["seconds"],
        stall_seconds=line.get("stall_seconds"),
        bytes=line.get("bytes"),
    )


def _means(values: Mapping[str, list[float | None]]) -> dict[str, float]:
    """Mean seconds of each phase over the newest steps."""
    means = {}
    for name, column in values.items():
        known = [value for value in column if value is not None]
        if name.startswith(PHASE) and known:
            means[name.removeprefix(PHASE)] = sum(known) / len(known)
    return means


def _fed(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What has fed these ranks, all together."""
    if not reports:
        return None
    newest = reports.values()
    fed: dict[str, Any] = {
        name: sum(report[name] for report in newest) for name in ("expected", "delivered", "replaced", "queue")
    }
    fed["unaccounted"] = fed["expected"] - fed["delivered"] - fed["replaced"]
    fed["bad_samples"] = _by_reason(report["bad_samples"] for report in newest)
    fed["retries"] = _by_reason(report["storage"].get("retries", {}) for report in newest)
    for name in ("cache_hits", "cache_misses", "bytes_read"):
        fed[name] = sum(report["storage"].get(name, 0) for report in newest)
    return fed


def _by_reason(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of all ranks, by reason, without those of nothing."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: number for reason, number in total.most_common() if number}


def _rank(rank: int, report: Mapping[str, Any], started: float | None) -> RankView:
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

"""What became of a run's time, over all its restarts: told from its own files, so there is nothing else to keep.

Wall time counts from the first start. Productive are the seconds of steps that count; all else is lost to something.
What a restart costs is the time since the state was reached that it goes on from: steps to repeat, standstill, start.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    tell,
)

TELL_SECONDS = 20.0  # a rate over a minute, the shortest that dashboards look at, always sees two
CAUSES = ("killed", "error", "hang", "lost", "stopped", "outage", "finished")
LAST_WORDS = {"Stopping": "stopped", "Finished": "finished"}


@dataclass(frozen=True)
class LostTime:
    """Seconds lost after `step` steps; all that follows a step is lost again, once, when the run goes back to it."""

    step: int
    what: str
    seconds: float


@dataclass(frozen=True)
class StartInfo:
    """When this start of the run began (Unix seconds), and why a supervisor made it, where one did so again."""

    began: float
    cause: str = ""
    reason: str = ""
    attempt: int = 0


class GoodputTracker:
    """Listens, and tells `Restarted` and `Accounts`; to be told of `Started` after the files' writers.

    Args:
        folder: the run folder, with `log.jsonl` and `metrics.jsonl`.
        listeners: whom to tell.
        birth: of this start.
        clock: gives Unix seconds.
    """

    def __init__(
        self,
        folder: Path,
        listeners: Sequence[Listener],
        birth: StartInfo,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._listeners = listeners
        self._birth = birth
        self._began = birth.began
        self._clock = clock
        self._productive = 0.0
        self._losses: list[LostTime] = []
        self._restarts: Counter[str] = Counter()
        self._told = clock()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case Started(step):
                self._start(step)
            case StepDone():
                self._book_step(event.step, event.seconds, event.phases, taken=event.taken)
                if self._clock() - self._told >= TELL_SECONDS:
                    self._tell()
            case CheckpointWritten():
                self._losses.append(LostTime(event.step, "checkpoint", event.stall_seconds))
            case Evaluated():
                self._losses.append(LostTime(event.step, "evaluation", event.seconds))
            case Stopping() | Finished() | Failed():
                self._tell()

    def _start(self, step: int) -> None:
        """Read what there was, and book what it cost to come back to `step`."""
        now = self._clock()
        log = list(_lines(self._folder / "log.jsonl"))
        starts = [line for line in log if line["event"] == "Started"][:-1]  # the last is this one
        accounts = [line for line in log if line["event"] == "Accounts"]
        if accounts:
            self._began = accounts[0]["time"] - accounts[0]["wall_seconds"]
            self._losses.append(LostTime(-1, "starting", accounts[0]["lost_seconds"]["starting"]))
        reached = starts[0]["time"] if starts else now
        for line in _lines(self._folder / "metrics.jsonl"):
            self._book_step(line["step"], line["seconds"], line.get("phases", {}), taken=line["taken"])
            if line["step"] == step:
                reached = line["time"]
        for line in log:
            self._replay(line)
        if starts:
            cause, reason, attempt = self._cause(log)
            lost = max(0.0, now - reached)
            self._losses.append(LostTime(step, cause, lost))
            self._restarts[cause] += 1
            tell(self._listeners, Restarted(cause, attempt, lost, reason, step))
        else:
            self._losses.append(LostTime(-1, "starting", now - self._began))
        self._tell()

    def _replay(self, line: dict[str, Any]) -> None:
        match line["event"]:
            case "Started":
                self._losses = [x for x in self._losses if x.step < line["step"] or x.what == "skipped"]
            case "Restarted":
                self._losses.append(LostTime(line["step"], line["cause"], line["lost_seconds"]))
                self._restarts[line["cause"]] += 1
            case "CheckpointWritten":
                self._losses.append(LostTime(line["step"], "checkpoint", line.get("stall_seconds", line["seconds"])))
            case "Evaluated":
                self._losses.append(LostTime(line["step"], "evaluation", line["seconds"]))

    def _cause(self, log: list[dict[str, Any]]) -> tuple[str, str, int]:
        if self._birth.cause:
            return self._birth.cause, self._birth.reason, self._birth.attempt
        told = [line for line in log if line["event"] in (*LAST_WORDS, "Started")][:-1]
        cause = LAST_WORDS.get(told[-1]["event"], "outage") if told else "outage"
        return cause, "an end without a word" if cause == "outage" else f"the run before had {cause}", 0

    def _book_step(self, step: int, seconds: float, phases: Mapping[str, float], *, taken: bool) -> None:
        seconds -= phases.get("checkpoint", 0.0)  # which the checkpoint itself tells as its stall
        if taken:
            self._productive += seconds
        else:
            self._losses.append(LostTime(step, "skipped", seconds))

    def _tell(self) -> None:
        now = self._told = self._clock()
        wall = max(now - self._began, 1e-9)
        lost: defaultdict[str, float] = defaultdict(float)
        for loss in self._losses:
            lost[loss.what] += loss.seconds
        lost["other"] = max(0.0, wall - self._productive - sum(lost.values()))
        ratio = min(1.0, self._productive / wall)
        tell(self._listeners, Accounts(ratio, wall, self._productive, dict(lost), dict(self._restarts)))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a file's lines say, but for those that a kill or a full disk has cut off, with what was added to them."""
    if path.exists():
        parsed = map(_parsed, path.read_bytes().splitlines())
        yield from (line for line in parsed if line is not None)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None

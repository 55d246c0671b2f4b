"""A rank's sign of life: a small file that says what the rank is at, for whoever watches it from beside.

The training loop sets an attribute; a thread writes it down twice a second. So the loop waits for no file, and a
process that is stopped, or held by a library that never lets go, falls silent.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

BEAT_SECONDS = 0.5
WINDOW = 50  # steps whose median is the usual one
SETTLED = 3  # steps before there is a usual one: the first compile, fill caches, or wait for data
LINE_BYTES = 256

STEPPING = "stepping"
WAITING, STARTING, SAVING, EVALUATING = "waiting", "starting", "saving", "evaluating"


@dataclass(frozen=True)
class Beat:
    """What a rank was at; times are of the machine's monotonic clock, which all its processes share.

    Attributes:
        rank: over all nodes.
        pid: its process.
        step: steps done.
        phase: `stepping`, or one of those that may take long: `starting`, `waiting` for data, `saving`, `evaluating`.
        since: when this phase of this step began.
        told: when this was written.
        usual: median seconds of a step, once there is one.
    """

    rank: int
    pid: int
    step: int
    phase: str
    since: float
    told: float
    usual: float | None


class Heartbeat:
    """What this rank is at. Without a folder nobody watches, and nothing is written.

    Args:
        folder: of the supervisor, on this machine.
        rank: over all nodes.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._rank = rank
        self._looks: list[Callable[[], None]] = []
        self._at = (0, STARTING, time.monotonic())
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._step_began: float | None = None
        self._file = None if folder is None else os.open(beat_file(folder, rank), os.O_CREAT | os.O_WRONLY, 0o600)

    def start(self) -> None:
        """Beat from now on."""
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def at_every_beat(self, look: Callable[[], None]) -> None:
        """Also call this, twice a second, in the thread; an `OSError` of it is forgotten, the next beat asks again."""
        self._looks.append(look)

    def begins_step(self, step: int) -> None:
        """The loop waits for the batch of the step after `step` steps."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now
        self._at = (step, WAITING, now)

    def enters(self, phase: str) -> None:
        """Another phase of the same step; what happens between steps does not count as a part of one."""
        if phase != STEPPING:
            self._step_began = None
        self._at = (self._at[0], phase, time.monotonic())

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self._beat()

    def _beat(self) -> None:
        for look in self._looks:
            with suppress(OSError):  # a network disk's may pass, and must not end the thread
                look()
        if self._file is None:
            return
        step, phase, since = self._at
        usual = median(self._steps.copy()) if len(self._steps) >= SETTLED else None
        beat = Beat(self._rank, os.getpid(), step, phase, since, time.monotonic(), usual)
        with suppress(OSError):
            os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(LINE_BYTES), 0)


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank beats."""
    return folder / f"rank-{rank:05d}.beat"


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank of this machine, in rank order; one that is just being written is left out."""
    return [beat for file in sorted(folder.glob("rank-*.beat")) if (beat := _read(file))]


def _read(file: Path) -> Beat | None:
    try:
        return Beat(**json.loads(file.read_text()))
    except (OSError, ValueError):
        return None

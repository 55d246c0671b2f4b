"""A rank's heartbeat: a small file with the rank's current phase, which the supervisor polls.

The training loop sets an attribute; a thread writes the file twice a second. The loop never waits for the file, and the
heartbeat stops when the process is suspended or a library never releases the interpreter.
"""

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
WINDOW = 50  # steps of which the median is taken
MIN_STEPS = 3  # before there is a median: the first steps compile, fill caches or wait for data
LINE_BYTES = 256

STEPPING = "stepping"
WAITING, STARTING, SAVING, EVALUATING = "waiting", "starting", "saving", "evaluating"


@dataclass(frozen=True)
class Beat:
    """A rank's status; times are of the machine's monotonic clock, which all its processes share.

    Attributes:
        rank: over all nodes.
        pid: of its process.
        step: steps done.
        phase: `stepping`, or one that may take long: `starting`, `waiting` for data, `saving`, `evaluating`.
        since: when this phase of this step began.
        written_at: when this beat was written.
        median_step_seconds: of the last steps; None before there are enough.
    """

    rank: int
    pid: int
    step: int
    phase: str
    since: float
    written_at: float
    median_step_seconds: float | None


class Heartbeat:
    """Publishes this rank's status. Without a folder it writes nothing.

    Args:
        folder: of the supervisor, on this machine.
        rank: over all nodes.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._rank = rank
        self._callbacks: list[Callable[[], None]] = []
        self._status = (0, STARTING, time.monotonic())
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._step_began: float | None = None
        self._file = None if folder is None else os.open(beat_file(folder, rank), os.O_CREAT | os.O_WRONLY, 0o600)

    def start(self) -> None:
        """Beat now, and from now on in a thread."""
        self.beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def on_beat(self, callback: Callable[[], None]) -> None:
        """Call this at every beat, in the thread; an `OSError` is ignored until the next beat."""
        self._callbacks.append(callback)

    def start_step(self, step: int) -> None:
        """The loop waits for the batch of the step after `step` steps."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now
        self._status = (step, WAITING, now)

    def enter_phase(self, phase: str) -> None:
        """Enter another phase of the same step; a phase between steps does not count as step time."""
        if phase != STEPPING:
            self._step_began = None
        self._status = (self._status[0], phase, time.monotonic())

    def beat(self) -> None:
        """Call the callbacks and write the status."""
        for callback in self._callbacks:
            with suppress(OSError):  # a network disk's error may be transient, and must not end the thread
                callback()
        if self._file is None:
            return
        step, phase, since = self._status
        step_seconds = median(self._steps.copy()) if len(self._steps) >= MIN_STEPS else None
        beat = Beat(self._rank, os.getpid(), step, phase, since, time.monotonic(), step_seconds)
        with suppress(OSError):
            os.pwrite(self._file, json.dumps(asdict(beat)).encode().ljust(LINE_BYTES), 0)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.beat()


def beat_file(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return folder / f"rank-{rank:05d}.beat"


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank of this machine, in rank order, without beats that are incomplete."""
    return [beat for file in sorted(folder.glob("rank-*.beat")) if (beat := _read(file))]


def _read(file: Path) -> Beat | None:
    try:
        return Beat(**json.loads(file.read_text()))
    except (OSError, ValueError):
        return None

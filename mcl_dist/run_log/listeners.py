"""Who hears of every run: a person at the terminal, and the files of the run folder."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mcl_dist.errors import RankError, UserError
from mcl_dist.events import (
    CheckpointFailed,
    CheckpointRefused,
    CheckpointWritten,
    Evaluated,
    Event,
    Finished,
    LoaderReport,
    LossSpike,
    Notice,
    Restarted,
    Started,
    StepDone,
    StepSkipped,
    Stopping,
)
from mcl_dist.run_log.records import event_line, step_line
from mcl_dist.storage.folder import naming, write_file

LINE_SECONDS = 5.0  # between progress lines where nobody watches
NAMED = 4  # samples on a line of the terminal; the log has them all
MEASURES = {"top1": "top-1", "top5": "top-5", "mean_class": "mean of classes"}
SMOOTHING = 0.95  # of the step time that the ETA rests on


class Console:
    """Progress for a person: one line rewritten on a terminal, a line now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._mean_seconds: float | None = None
        self._bad_samples: dict[str, int] = {}
        self._last_line = -LINE_SECONDS

    def __call__(self, event: Event) -> None:
        """Print what the event says."""
        match event:
            case Started(step, total_steps, resumed_from):
                resumed = f"resumed from {resumed_from}, {step} of {total_steps} steps done"
                self._say(resumed if resumed_from else f"starting at step {step} of {total_steps}")
            case StepDone():
                self._progress(event)
            case StepSkipped(step, samples, reason, in_a_row):
                told = ", ".join(samples[:NAMED]) + (f" and {len(samples) - NAMED} more" if samples[NAMED:] else "")
                self._say(f"step {step} skipped, {in_a_row} in a row: {told}: {reason}")
            case LossSpike(step, loss, limit, None):
                self._say(f"step {step}: the loss leapt to {loss:.3f}, usual are up to {limit:.3f}")
            case LossSpike(step, loss, limit, back):
                self._say(
                    f"step {step}: the loss leapt to {loss:.3f}, usual are up to {limit:.3f}; "
                    f"went back to the checkpoint of step {back}"
                )
            case CheckpointWritten() | CheckpointFailed() | CheckpointRefused():
                self._say(_of_checkpoint(event))
            case LoaderReport(bad_samples=bad) if bad and bad != self._bad_samples:
                self._bad_samples = bad
                reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
                self._say(f"bad samples replaced by others: {reasons}; bad_samples.jsonl lists them")
            case Notice(text):
                self._say(text)
            case Restarted() | Stopping() | Finished() | Evaluated():
                self._say(_of_life(event))

    def _progress(self, done: StepDone) -> None:
        mean = self._mean_seconds
        self._mean_seconds = done.seconds if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * done.seconds
        now = time.monotonic()
        is_last = done.step == done.total_steps
        if not (self._rewrites or is_last or now - self._last_line >= LINE_SECONDS):
            return
        self._last_line = now
        terms = "  ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in done.losses.items()
            if name.startswith("loss")
        )
        left = _clock((done.total_steps - done.step) * self._mean_seconds)
        self._say(
            f"step {done.step}/{done.total_steps}  epoch {done.epoch}  {terms}  lr {done.learning_rate:.2e}  "
            f"{done.videos_per_second:.1f} videos/s  waiting {done.data_wait_ratio:.0%}  left {left}",
            stays=is_last or not self._rewrites,
        )

    def _say(self, line: str, *, stays: bool = True) -> None:
        start = "\r\033[K" if self._rewrites else ""
        with suppress(OSError):  # of a terminal that was closed: the run goes on
            print(f"{start}{line}", file=self._stream, end="\n" if stays else "", flush=True)


def _of_life(event: Restarted | Stopping | Finished | Evaluated) -> str:
    match event:
        case Restarted(lost_seconds=seconds, reason=reason):
            return f"this run goes on after {reason}; that took back or cost {_clock(seconds)}"
        case Evaluated(step, scores, seconds):
            told = "  ".join(f"{name} {scores[key]:.1%}" for key, name in MEASURES.items())
            return f"step {step}: kNN of held-out videos  {told}  in {seconds:.1f} s"
        case Stopping(step, reason):
            return f"stopping after step {step}, which is saved: {reason}"
        case Finished(step, peak_bytes):
            return f"finished {step} steps, peak memory {peak_bytes / 2**30:.2f} GiB per rank"


def _of_checkpoint(event: CheckpointWritten | CheckpointFailed | CheckpointRefused) -> str:
    match event:
        case CheckpointWritten(step, url, seconds):
            return f"checkpoint of step {step} written to {url} in {seconds:.1f} s"
        case CheckpointFailed(step, _, reason, in_a_row):
            return f"checkpoint of step {step} failed, {in_a_row} in a row: {reason}"
        case CheckpointRefused(url, reason):
            return f"{url}: passed over, {reason}"


class MetricsFile:
    """`metrics.jsonl`: a line a step; on resuming, lines of steps that will be repeated are dropped.

    Raises:
        RankError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        """Append a step's line."""
        match event:
            case Started(step, _, _):
                with _naming(self._path):
                    kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= step]
                    write_file(str(self._path), "".join(kept).encode())
            case StepDone():
                _append(self._path, step_line(event))


class EventLog:
    """`log.jsonl`: what happened to a run other than its steps, a line an event, with the time.

    Raises:
        RankError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_off_half_a_line(path)
        self._path = path

    def __call__(self, event: Event) -> None:
        """Append the event, unless it is a step."""
        if not isinstance(event, StepDone):
            _append(self._path, event_line(event))


def _append(path: Path, fields: Mapping[str, object]) -> None:
    line = json.dumps(fields) + "\n"
    with _naming(path), path.open("a") as file:
        file.write(line)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error, which is this rank's to tell: no other writes that file."""
    try:
        with naming(str(path)):
            yield
    except UserError as error:
        raise RankError(str(error)) from error


def _cut_off_half_a_line(path: Path) -> None:
    """Take away what a kill or a full disk has left of a last line: the next one would be added to it."""
    if path.exists() and not (lines := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, lines.rfind(b"\n") + 1)


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file that a killed run may have left without its last end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

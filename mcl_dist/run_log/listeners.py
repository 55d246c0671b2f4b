"""Listeners of every run: the console, and the files of the run folder."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

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
from mcl_dist.storage import jsonl
from mcl_dist.storage.folder import readable_errors, write_file

LINE_SECONDS = 5.0  # between progress lines if the output is not a terminal
MAX_SAMPLES = 4  # samples in a console line; the log has all
SCORE_LABELS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean of classes"}
SMOOTHING = 0.95  # of the step time used for the ETA


class Console:
    """Progress for a person: one rewritten line on a terminal, else a line every few seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._mean_seconds: float | None = None
        self._bad_samples: dict[str, int] = {}
        self._last_line = -LINE_SECONDS

    def __call__(self, event: Event) -> None:
        """Print an event."""
        match event:
            case Started() | Restarted() | Stopping() | Finished() | Evaluated():
                self._print(_run_message(event))
            case StepDone():
                self._print_progress(event)
            case StepSkipped() | LossSpike() | CheckpointWritten() | CheckpointFailed() | CheckpointRefused():
                self._print(_incident_message(event))
            case LoaderReport(bad_samples=bad) if bad and bad != self._bad_samples:
                self._bad_samples = bad
                reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
                self._print(f"bad samples replaced: {reasons}; bad_samples.jsonl lists them")
            case Notice(text):
                self._print(text)

    def _print_progress(self, done: StepDone) -> None:
        mean = self._mean_seconds
        self._mean_seconds = done.seconds if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * done.seconds
        now = time.monotonic()
        is_last = done.step == done.total_steps
        if not (self._rewrites or is_last or now - self._last_line >= LINE_SECONDS):
            return
        self._last_line = now
        losses = "  ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in done.losses.items()
            if name.startswith("loss")
        )
        left = _duration((done.total_steps - done.step) * self._mean_seconds)
        self._print(
            f"step {done.step}/{done.total_steps}  epoch {done.epoch}  {losses}  lr {done.learning_rate:.2e}  "
            f"{done.videos_per_second:.1f} videos/s  waiting {done.data_wait_ratio:.0%}  left {left}",
            keep=is_last or not self._rewrites,
        )

    def _print(self, line: str, *, keep: bool = True) -> None:
        start = "\r\033[K" if self._rewrites else ""
        with suppress(OSError):  # the run continues after its terminal is closed
            print(f"{start}{line}", file=self._stream, end="\n" if keep else "", flush=True)


def _run_message(event: Started | Restarted | Stopping | Finished | Evaluated) -> str:
    match event:
        case Started(step, total_steps, None | ""):
            return f"starting at step {step} of {total_steps}"
        case Started(step, total_steps, resumed_from):
            return f"resumed from {resumed_from}, {step} of {total_steps} steps done"
        case Restarted(lost_seconds=seconds, reason=reason):
            return f"resumed after {reason}; {_duration(seconds)} lost"
        case Evaluated(step, scores, seconds):
            top = "  ".join(f"{label} {scores[name]:.1%}" for name, label in SCORE_LABELS.items())
            return f"step {step}: kNN of held-out videos  {top}  in {seconds:.1f} s"
        case Stopping(step, reason):
            return f"stopping after step {step}, which is saved: {reason}"
        case Finished(step, peak_bytes):
            return f"finished {step} steps, peak memory {peak_bytes / 2**30:.2f} GiB per rank"


def _incident_message(
    event: StepSkipped | LossSpike | CheckpointWritten | CheckpointFailed | CheckpointRefused,
) -> str:
    match event:
        case StepSkipped(step, samples, reason, in_a_row):
            more = f" and {len(samples) - MAX_SAMPLES} more" if samples[MAX_SAMPLES:] else ""
            return f"step {step} skipped, {in_a_row} in a row: {', '.join(samples[:MAX_SAMPLES])}{more}: {reason}"
        case LossSpike(step, loss, limit, back):
            rollback = "" if back is None else f"; rolled back to the checkpoint of step {back}"
            return f"step {step}: loss spike: {loss:.3f} (limit {limit:.3f}){rollback}"

        case CheckpointWritten(step, url, seconds):
            return f"checkpoint of step {step} written to {url} in {seconds:.1f} s"
        case CheckpointFailed(step, _, reason, in_a_row):
            return f"checkpoint of step {step} failed, {in_a_row} in a row: {reason}"
        case CheckpointRefused(url, reason):
            return f"{url} rejected: {reason}"


class MetricsFile:
    """`metrics.jsonl`: one line a step; on resuming, the lines of steps that will be repeated are dropped.

    Raises:
        RankError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: Event) -> None:
        """Append the record of a step."""
        match event:
            case Started(step, _, _):
                with _rank_errors(self._path):
                    self._keep_steps_up_to(step)
            case StepDone():
                with _rank_errors(self._path):
                    jsonl.append(self._path, step_record(event))

    def _keep_steps_up_to(self, step: int) -> None:
        lines = jsonl.complete_lines(self._path.read_bytes()) if self._path.exists() else []
        write_file(str(self._path), b"".join(line for line in lines if json.loads(line)["step"] <= step))


class EventLog:
    """`log.jsonl`: all events except steps, one line each, with the time.

    Raises:
        RankError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with _rank_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            jsonl.truncate_incomplete_line(path)
        self._path = path

    def __call__(self, event: Event) -> None:
        """Append the event unless it is a step."""
        if not isinstance(event, StepDone):
            with _rank_errors(self._path):
                jsonl.append(self._path, event_record(event))


def step_record(done: StepDone) -> dict[str, Any]:
    """The record of a step, with the current time in Unix seconds."""
    return {
        "time": time.time(),
        "step": done.step,
        "epoch": done.epoch,
        **{name: _finite(value) for name, value in done.losses.items()},
        "learning_rate": done.learning_rate,
        "gradient_norm": _finite(done.gradient_norm),
        "taken": done.taken,
        "videos_per_second": done.videos_per_second,
        "data_wait_ratio": done.data_wait_ratio,
        "seconds": done.seconds,
        "phases": done.phases,
        "momentum": done.momentum,
        "queue_fill": done.queue_fill,
        "queue_age": done.queue_age,
        "flops_per_second": done.flops / done.seconds,
    }


def event_record(event: Event) -> dict[str, Any]:
    """The record of any other event, with its class name and the current time in Unix seconds."""
    return {"time": time.time(), "event": type(event).__name__, **asdict(event)}


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


@contextmanager
def _rank_errors(path: Path) -> Iterator[None]:
    """Turn errors into a `RankError` that names the file: this rank must report them, as it alone writes the file."""
    try:
        with readable_errors(str(path)):
            yield
    except UserError as error:
        raise RankError(str(error)) from error


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

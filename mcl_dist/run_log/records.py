"""What a run's files say of an event: a line of `metrics.jsonl` for a step, one of `log.jsonl` for anything else."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from mcl_dist.events import Event, StepDone


def step_line(done: StepDone) -> dict[str, Any]:
    """A step as it is written and shown, with the time (Unix seconds) at which it is told."""
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
        "flops_per_second": done.operations / done.seconds,
    }


def event_line(event: Event) -> dict[str, Any]:
    """Any other event, under the name of its class."""
    return {"time": time.time(), "event": type(event).__name__, **asdict(event)}


def _finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else None

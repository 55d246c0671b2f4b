"""Records of events in a run's files: of a step in `metrics.jsonl`, of any other event in `log.jsonl`."""

import math
import time
from dataclasses import asdict
from typing import Any

from mcl_dist.events import Event, StepDone


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

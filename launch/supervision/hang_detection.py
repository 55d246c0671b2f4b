"""When a rank that still runs, or seems to, will not come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.supervision.processes import ProcessEntry
from mcl_dist.config import number
from mcl_dist.distributed.heartbeat import STEPPING, Beat


@dataclass(frozen=True)
class SuperviseConfig:
    """When a run is ended and started again.

    Attributes:
        restarts: without progress, before the run is given up.
        progress_steps: farther than ever before that count as progress.
        hang_factor: times the usual (median) step that a step may take …
        hang_seconds_min: … though never less than this.
        silent_seconds: without a sign of life, which ranks give twice a second: stopped, or held by the system.
        pause_seconds: that starting, waiting for data, saving or evaluating may take.
        collective_seconds: that ranks wait for one another in a collective operation; what ends a run that nobody
            supervises.
        node_seconds: without word from another node, after which all nodes start again.
        join_seconds: that nodes wait for one another at the start of each attempt.
    """

    restarts: int = number(5, minimum=0)
    progress_steps: int = number(100, minimum=1)
    hang_factor: float = number(20.0, minimum=2)
    hang_seconds_min: float = number(120.0, minimum=1)
    silent_seconds: float = number(60.0, minimum=2)
    pause_seconds: float = number(3600.0, minimum=1)
    collective_seconds: float = number(1800.0, minimum=1)
    node_seconds: float = number(60.0, minimum=2)
    join_seconds: float = number(1800.0, minimum=1)


def is_pausing(beats: Sequence[Beat]) -> bool:
    """Whether a rank is at what may take long, so that others wait for it in the midst of a step."""
    return any(beat.phase != STEPPING for beat in beats)


def hang(beats: Sequence[Beat], config: SuperviseConfig, now: float, *, others_pause: bool = False) -> str | None:
    """Which rank hangs, in a sentence; None where all is well.

    Args:
        beats: of the ranks of this node that have not left.
        config: the limits.
        now: of the monotonic clock.
        others_pause: on another node, a rank is at what may take long.
    """
    patient = others_pause or is_pausing(beats)
    for beat in beats:
        if now - beat.told > config.silent_seconds:
            what = "is stopped" if ProcessEntry(beat.pid).is_stopped else "gives no sign of life"
            return f"rank {beat.rank} {what}, for {now - beat.told:.0f} s, at step {beat.step}"
    for beat in beats:
        seconds = now - beat.since
        if patient or beat.usual is None:
            limit = config.pause_seconds
        else:
            limit = max(config.hang_seconds_min, config.hang_factor * beat.usual)
        if seconds > limit:
            return f"rank {beat.rank} has been {beat.phase} for {seconds:.0f} s at step {beat.step}"
    return None

"""Detection of ranks that hang."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.supervision.processes import ProcessEntry
from mcl_dist.config import number
from mcl_dist.distributed.heartbeat import STEPPING, Beat


@dataclass(frozen=True)
class SuperviseConfig:
    """When a run is ended and restarted.

    Attributes:
        restarts: consecutive restarts without progress before the run fails.
        progress_steps: steps beyond the highest one so far that count as progress.
        hang_factor: longest step, as a multiple of the median step …
        hang_seconds_min: … but never below this.
        silent_seconds: without a heartbeat (ranks write two a second): the process is stopped or blocked.
        pause_seconds: longest slow phase: starting, waiting for data, saving or evaluating.
        collective_seconds: timeout of collective operations; it also ends a run that has no supervisor.
        node_seconds: without a message from another node, after which all nodes restart.
        join_seconds: that nodes wait for one another at the start of an attempt.
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


def any_in_slow_phase(beats: Sequence[Beat]) -> bool:
    """Whether a rank is in a phase other than stepping; the other ranks may then wait for it inside a step."""
    return any(beat.phase != STEPPING for beat in beats)


def find_hang(
    beats: Sequence[Beat], config: SuperviseConfig, now: float, *, others_in_slow_phase: bool = False
) -> str | None:
    """Describe the first rank of this node that hangs, from its beats and the monotonic clock; None if no rank does."""
    is_slow = others_in_slow_phase or any_in_slow_phase(beats)
    for beat in beats:
        if (silent_seconds := now - beat.written_at) > config.silent_seconds:
            state = "has been stopped" if ProcessEntry(beat.pid).is_stopped else "has sent no heartbeat"
            return f"rank {beat.rank} {state} for {silent_seconds:.0f} s at step {beat.step}"
    for beat in beats:
        limit = config.pause_seconds
        if beat.median_step_seconds is not None and not is_slow:
            limit = max(config.hang_seconds_min, config.hang_factor * beat.median_step_seconds)
        if (seconds := now - beat.since) > limit:
            return f"rank {beat.rank} has been {beat.phase} for {seconds:.0f} s at step {beat.step}"
    return None

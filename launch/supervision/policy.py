"""Restart policy of a run, and the loop that applies it; the supervisor of a node and the cluster controller use it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from launch.supervision.messages import log
from launch.supervision.outcome import Outcome

MAX_BACKOFF_SECONDS = 60.0


@dataclass
class RestartPolicy:
    """Limits the restarts since the last progress, which is `progress_steps` beyond the highest step of any attempt."""

    limit: int
    progress_steps: int
    num_restarts: int = 0
    max_step: int = 0

    def allow(self, step: int) -> bool:
        """Count a restart after an attempt that ended at `step`; returns whether it is within the limit."""
        if step >= self.max_step + self.progress_steps:
            self.num_restarts = 0
        self.max_step = max(self.max_step, step)
        self.num_restarts += 1
        return self.num_restarts <= self.limit

    @property
    def backoff_seconds(self) -> float:
        """Seconds to wait before the restart just allowed: 0 for the first, then exponential."""
        return 0.0 if self.num_restarts < 2 else min(MAX_BACKOFF_SECONDS, 2.0 ** (self.num_restarts - 2))


class AttemptResult(NamedTuple):
    """How one attempt ended, after how many steps; no restart follows a final one, even if its outcome is retryable."""

    outcome: Outcome
    step: int
    is_final: bool = False


def run_with_restarts(
    policy: RestartPolicy, attempt: Callable[[Outcome | None], AttemptResult], wait: Callable[[float], object]
) -> Outcome:
    """Run attempts until one ends for good or the policy allows no restart; returns the last outcome.

    An attempt gets the outcome that caused the restart, the first None; `wait` sleeps for so many seconds at most.
    """
    cause: Outcome | None = None
    while True:
        result = attempt(cause)
        cause = result.outcome
        if result.is_final or not cause.is_retryable or not policy.allow(result.step):
            return cause
        count = f"restart {policy.num_restarts} of {policy.limit}"
        log(f"{cause.reason}; restarting from the newest checkpoint ({count})")
        wait(policy.backoff_seconds)

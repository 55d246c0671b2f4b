"""How often a run is restarted."""

from __future__ import annotations

from launch.supervision.outcome import DONE, KILLED, Outcome
from launch.supervision.policy import AttemptResult, RestartPolicy, run_with_restarts

KILL, SUCCESS = Outcome(1, KILLED, "rank 0 was killed by SIGKILL"), Outcome(0, DONE, "all is done")


def test_restarts_are_limited_until_there_is_progress() -> None:
    policy = RestartPolicy(limit=2, progress_steps=10)
    assert [policy.allow(step) for step in (12, 13, 14)] == [True, True, False]
    assert policy.allow(24)
    assert policy.num_restarts == 1


def test_the_first_restart_is_immediate_and_later_ones_back_off() -> None:
    policy = RestartPolicy(limit=9, progress_steps=10)
    delays = [policy.backoff_seconds for _ in range(9) if policy.allow(0)]
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def run(results: list[AttemptResult], limit: int) -> tuple[Outcome, list[Outcome | None], list[float]]:
    """The last outcome, the causes given to the attempts, and the delays between them."""
    causes: list[Outcome | None] = []
    delays: list[float] = []

    def attempt(cause: Outcome | None) -> AttemptResult:
        causes.append(cause)
        return results[len(causes) - 1]

    outcome = run_with_restarts(RestartPolicy(limit, progress_steps=10), attempt, delays.append)
    return outcome, causes, delays


def test_a_failed_attempt_is_repeated_with_its_outcome_as_the_cause() -> None:
    results = [AttemptResult(KILL, 5), AttemptResult(KILL, 6), AttemptResult(SUCCESS, 9)]
    assert run(results, limit=2) == (SUCCESS, [None, KILL, KILL], [0, 1])


def test_attempts_end_at_the_limit_or_with_a_final_result() -> None:
    assert run([AttemptResult(KILL, 5)] * 2, limit=1) == (KILL, [None, KILL], [0])
    assert run([AttemptResult(KILL, 5, is_final=True)], limit=1) == (KILL, [None], [])

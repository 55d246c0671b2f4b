"""The outcome of an attempt, from those of its ranks."""

from __future__ import annotations

from launch.supervision.outcome import CRASHED, DONE, HUNG, KILLED, LOST, STOPPED, USER, Outcome, attempt_outcome


def test_an_error_of_the_user_explains_the_attempt_before_its_consequences() -> None:
    user, lost = Outcome(1, USER, "no space"), Outcome(1, LOST, "another rank is gone")
    assert attempt_outcome({0: lost, 1: user}, [], 1).reason == "rank 1: no space"
    assert not attempt_outcome({0: lost, 1: user}, [2], 1).is_retryable
    assert attempt_outcome({0: lost}, [1], 247) == Outcome(1, KILLED, "rank 1 was killed by SIGKILL")
    assert attempt_outcome({0: Outcome(75, STOPPED, ""), 1: Outcome(0, DONE, "")}, [], 75).exit_code == 75


def test_a_launcher_without_ranks_is_reported_with_its_exit_code() -> None:
    assert attempt_outcome({}, [], 3) == Outcome(1, KILLED, "the launcher exited with code 3")


def test_hangs_and_crashes_are_retryable() -> None:
    assert {cause for cause in (HUNG, CRASHED) if Outcome(1, cause, "").is_retryable} == {HUNG, CRASHED}

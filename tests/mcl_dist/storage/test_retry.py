from __future__ import annotations

from collections.abc import Callable

import pytest

from mcl_dist.errors import UserError
from mcl_dist.storage.retry import RetryPolicy, TransientError


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcl_dist.storage.store_requests.FIRST_WAIT", 0.0)


def failing(*errors: Exception) -> Callable[[], str]:
    """A call that raises these errors in turn, then succeeds."""
    remaining = iter(errors)

    def call() -> str:
        if error := next(remaining, None):
            raise error
        return "done"

    return call


def user_error(cause: Exception) -> UserError:
    error = UserError("store: failed")
    error.__cause__ = cause
    return error


def test_transient_failures_are_retried_counted_and_warned_of_at_the_third() -> None:
    warnings: list[str] = []
    retry = RetryPolicy(warn=warnings.append)
    errors = [
        user_error(ConnectionResetError()),
        TransientError("short_body", "store: short"),
        user_error(TimeoutError()),
    ]
    assert retry.call(failing(*errors)) == "done"
    assert retry.failures == {"reset": 1, "short_body": 1, "stall": 1}
    assert warnings == ["store: failed; retrying for up to 300 s"]


def test_a_permanent_failure_is_raised_at_once_and_not_counted() -> None:
    retry = RetryPolicy()
    with pytest.raises(UserError, match=r"^store: failed$"):
        retry.call(failing(user_error(PermissionError())))
    assert not retry.failures


def test_a_call_is_given_up_after_the_deadline_or_once_the_policy_has_ended() -> None:
    expired, ended = RetryPolicy(seconds=-1), RetryPolicy()
    ended.ended.set()
    for retry in (expired, ended):
        with pytest.raises(UserError, match=r"^store: failed; given up after 1 tries in 0 s; check the store"):
            retry.call(failing(user_error(TimeoutError())))
        assert retry.failures == {"stall": 1}

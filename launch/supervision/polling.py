"""Wait for a condition by polling it."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
POLL_SECONDS = 0.02


def wait_until(condition: Callable[[], Value], seconds: float, poll_seconds: float = POLL_SECONDS) -> Value:
    """Poll until the condition is true or the time is over; returns its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(poll_seconds)
    return value

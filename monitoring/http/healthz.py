"""The endpoint `/healthz`: whether a process makes progress, and its step."""

import json
import time
from collections.abc import Iterable
from typing import Any


class Healthz:
    """WSGI application that reports the time since the last heartbeat.

    Args:
        stale_seconds: time without a heartbeat after which the process counts as stale.

    Attributes:
        step: completed steps.
    """

    def __init__(self, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._last = time.monotonic()
        self.step = 0

    def beat(self, step: int) -> None:
        """Record a heartbeat: a completed step, or progress of an evaluation between two steps."""
        self._last = time.monotonic()
        self.step = step

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat or the start."""
        return time.monotonic() - self._last

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:  # noqa: ARG002
        """Answer 200, or 503 when stale, with status, step and age as JSON."""
        age = self.age
        is_stale = age > self._stale_seconds
        start_response("503 Service Unavailable" if is_stale else "200 OK", [("Content-Type", "application/json")])
        health = {"status": "stale" if is_stale else "ok", "step": self.step, "age_seconds": round(age, 3)}
        return [json.dumps(health).encode() + b"\n"]

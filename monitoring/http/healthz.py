"""Whether a process still gets on: when its last step or sign of life was, and what `/healthz` says of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any


class Healthz:
    """The time of the last step, and a WSGI application that tells it.

    Args:
        stale_seconds: after which a process without a step counts as stuck.

    Attributes:
        step: steps done.
    """

    def __init__(self, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._last = time.monotonic()
        self.step = 0

    def beat(self, step: int) -> None:
        """A step is done, or what stands between two of them, an evaluation, gets on."""
        self._last = time.monotonic()
        self.step = step

    @property
    def age(self) -> float:
        """Seconds since the last beat, or the start."""
        return time.monotonic() - self._last

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:  # noqa: ARG002
        """Answer 200, or 503 when stuck, with what is known as JSON."""
        age = self.age
        is_stale = age > self._stale_seconds
        start_response("503 Service Unavailable" if is_stale else "200 OK", [("Content-Type", "application/json")])
        said = {"status": "stale" if is_stale else "ok", "step": self.step, "age_seconds": round(age, 3)}
        return [json.dumps(said).encode() + b"\n"]

"""Retries of transient failures, with exponential backoff and a deadline."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import SLOWEST, Failure, backoff, classify_failure

Result = TypeVar("Result")
WARN_AT = 3  # failures in a row; one or two are common and need no warning


class TransientError(UserError):
    """A response is wrong, and a retry may get the right one; `reason` classifies the fault."""

    def __init__(self, reason: Failure, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class RetryPolicy:
    """Retries transient failures with growing waits and counts them; threads may share it.

    Attributes:
        seconds: from the first failure until the call is given up.
        request_seconds: time limit of one request; a second more for each MiB.
        warn: called with one line when a call fails several times in a row.
        failures: failed requests by reason.
        ended: once set, calls no longer wait: the next failure is final.
    """

    seconds: float = 300.0
    request_seconds: float = 30.0
    warn: Callable[[str], None] = logging.getLogger(__name__).warning
    failures: Counter[Failure] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def timeout(self, num_bytes: int = 0) -> float:
        """Time limit, in seconds, of a request that transfers `num_bytes`."""
        return self.request_seconds + num_bytes / SLOWEST

    def call(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, repeated while it fails transiently.

        Raises:
            UserError: the failure is permanent, or the deadline has passed.
        """
        first_failure = None
        for tries, wait in enumerate(backoff(), start=1):
            try:
                return attempt()
            except UserError as error:
                self._count(error)
                now = time.monotonic()
                first_failure = first_failure or now
                if self.ended.is_set() or now - first_failure + wait > self.seconds:
                    raise UserError(
                        f"{error}; given up after {tries} tries in {now - first_failure:.0f} s; check the store and "
                        "the network, then run the same command again"
                    ) from error.__cause__
                if tries == WARN_AT:
                    self.warn(f"{error}; retrying for up to {self.seconds:.0f} s")
            self.ended.wait(wait)
        raise AssertionError("backoff never ends")

    def _count(self, error: UserError) -> None:
        """Count a transient failure; raise a permanent one."""
        reason = error.reason if isinstance(error, TransientError) else classify_failure(error.__cause__)
        if reason is None:
            raise error
        with self._lock:
            self.failures[reason] += 1

"""How long a store that fails now and then is asked again."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import SLOWEST, Failure, failure, waits

Result = TypeVar("Result")
TELL_AT = 3  # failures in a row; one or two are nothing that a person has to know of at once


class TransientError(UserError):
    """What came is not right, and may be the next time; `reason` says in which way."""

    def __init__(self, reason: Failure, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class RetryPolicy:
    """Repeats what failed in passing, with longer and longer waits, and counts it; threads may share it.

    Attributes:
        seconds: how long something is repeated before it is given up.
        request_seconds: after which a request without an answer is repeated; a second more for each MiB.
        tell: is told in a line when something fails several times in a row.
        failures: how many requests had to be made again, by reason.
        ended: once set, nothing is waited for any more.
    """

    seconds: float = 300.0
    request_seconds: float = 30.0
    tell: Callable[[str], None] = logging.getLogger(__name__).warning
    failures: Counter[Failure] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._counting = threading.Lock()

    def limit(self, num_bytes: int = 0) -> float:
        """Seconds that a request with so many bytes may take."""
        return self.request_seconds + num_bytes / SLOWEST

    def until_it_works(self, attempt: Callable[[], Result]) -> Result:
        """The attempt's result.

        Raises:
            UserError: it cannot work, or has not for all our patience.
        """
        first_failure = None
        for tries, wait in enumerate(waits(), start=1):
            try:
                return attempt()
            except UserError as error:
                reason = error.reason if isinstance(error, TransientError) else failure(error.__cause__)
                if reason is None:
                    raise
                with self._counting:
                    self.failures[reason] += 1
                now = time.monotonic()
                first_failure = first_failure or now
                if self.ended.is_set() or now - first_failure + wait > self.seconds:
                    raise UserError(
                        f"{error}; given up after {tries} tries in {now - first_failure:.0f} s; see that the store and "
                        "the network work, then run the same command again"
                    ) from error.__cause__
                if tries == TELL_AT:
                    self.tell(f"{error}; trying again, for {self.seconds:.0f} s")
            self.ended.wait(wait)
        raise AssertionError("waits never end")

"""Counters of what reading a shard set costs."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from mcl_dist.storage.store_requests import Failure

Quantity = Literal[
    "bytes_read", "bytes_decoded", "requests", "cache_hits", "cache_misses", "cache_evictions", "cache_repairs"
]
Stage = Literal["index", "fetch", "ranges", "read"]
Counters = dict[str, Any]  # numbers, and dictionaries of numbers

_QUANTITIES: tuple[Quantity, ...] = Quantity.__args__  # type: ignore[attr-defined]
_FAILURES: tuple[Failure, ...] = Failure.__args__  # type: ignore[attr-defined]
_STAGES: tuple[Stage, ...] = Stage.__args__  # type: ignore[attr-defined]


class ReadCounters:
    """Counters that only grow; thread-safe.

    Attributes:
        retries: failed requests by reason, counted by the retry policy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quantities: Counter[Quantity] = Counter()
        self.retries: Counter[Failure] = Counter()
        self._seconds: dict[Stage, float] = dict.fromkeys(_STAGES, 0.0)

    def add(self, quantity: Quantity, amount: int = 1) -> None:
        """Add an amount to a counter."""
        with self._lock:
            self._quantities[quantity] += amount

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the block's wall time to a stage; parallel threads each add theirs."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] += time.perf_counter() - start

    def snapshot(self) -> Counters:
        """All counts so far.

        `bytes_read` were received or read from local disk for use, `bytes_decoded` are of the stills passed on,
        `requests` includes failed ones, `retries` counts failed requests by reason, `seconds` sums wall time by
        stage over threads.
        """
        with self._lock:
            return {
                **{name: self._quantities[name] for name in _QUANTITIES},
                "retries": {name: self.retries[name] for name in _FAILURES},
                "seconds": dict(self._seconds),
            }

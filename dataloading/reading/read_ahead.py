"""Fetching what will be read next while something else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mcl_dist.errors import UserError

NUM_THREADS = 2  # a request that stalls does not hold up all


class ReadAhead:
    """Calls `fetch` for each expected item in order, until it says that there is no room for more.

    What fails is left to whoever needs the item: they will meet the error and tell it.
    """

    def __init__(self, fetch: Callable[[int], bool]) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()
        self._expected: list[int] = []
        self._working: set[int] = set()
        self._closed = False
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def expect(self, items: Sequence[int]) -> None:
        """What will be needed from now on, the soonest first."""
        with self._changed:
            self._expected = list(items)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads after what they are fetching now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            item, order = work
            try:
                there_is_room = self._fetch(item)
            except (UserError, RuntimeError):
                there_is_room = False
            with self._changed:
                self._working.discard(item)
                if not there_is_room:
                    order.clear()  # what was expected since then is another list

    def _next(self) -> tuple[int, list[int]] | None:
        """The next item and the order that it is of, when there is one."""
        with self._changed:
            while not self._closed:
                while self._expected:
                    item = self._expected.pop(0)
                    if item not in self._working:
                        self._working.add(item)
                        return item, self._expected
                self._changed.wait()
        return None

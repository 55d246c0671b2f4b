"""Prefetching in background threads."""

import threading
from collections.abc import Callable, Sequence

from mcl_dist.errors import UserError

NUM_THREADS = 2  # so that one stalled request does not stop all prefetching


class ReadAhead:
    """Calls `fetch` for each expected item in order, until it returns False for lack of space.

    Errors are ignored: the reader that needs the item meets and reports them.
    """

    def __init__(self, fetch: Callable[[int], bool]) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()
        self._expected: list[int] = []
        self._active: set[int] = set()
        self._closed = False
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()

    def expect(self, items: Sequence[int]) -> None:
        """Replace the expected items, the soonest first."""
        with self._changed:
            self._expected = list(items)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads after their current fetch."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            item, order = work
            try:
                has_space = self._fetch(item)
            except (UserError, RuntimeError):
                has_space = False
            with self._changed:
                self._active.discard(item)
                if not has_space:
                    order.clear()  # a newer order is another list, and stays

    def _next(self) -> tuple[int, list[int]] | None:
        """Wait for an item; return it with the order that it belongs to, or None once closed."""
        with self._changed:
            while not self._closed:
                while self._expected:
                    item = self._expected.pop(0)
                    if item not in self._active:
                        self._active.add(item)
                        return item, self._expected
                self._changed.wait()
        return None

"""Work done ahead by one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Runs an iterable in a thread, at most `depth` items ahead of whoever takes them.

    What the iterable raises is raised where the items are taken. While an item is awaited, `meanwhile` is called after
    every so many `seconds`.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        depth: int,
        name: str,
        meanwhile: Callable[[], None] = lambda: None,
        seconds: float | None = None,
    ) -> None:
        self._items = items
        self._meanwhile, self._seconds = meanwhile, seconds
        self._ready: SimpleQueue[Item | _End] = SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._produce, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                item = self._ready.get(timeout=self._seconds)
            except Empty:
                self._meanwhile()
                continue
            if isinstance(item, _End):
                # Whoever comes again finds the same end, not an empty queue to wait for.
                self._ready.put(item)
                if item.error is not None:
                    raise item.error
                return
            self._slots.release()
            yield item

    def __len__(self) -> int:
        """Items that are ready."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop after the item in work and wait for the thread to end; taken again, the items are over."""
        self._closed = True
        self._slots.release()
        self._thread.join()

    def _produce(self) -> None:
        error = None
        try:
            self._slots.acquire()
            for item in self._items:
                self._ready.put(item)
                self._slots.acquire()
                if self._closed:
                    break
        except BaseException as raised:
            error = raised
        self._ready.put(_End(error))


class _End:
    """No item will follow; `error` says why, if not because all was well."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

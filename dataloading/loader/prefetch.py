"""Prefetching in one thread."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Runs an iterable in a thread, at most `depth` items ahead of the consumer.

    An exception of the iterable is raised in the consumer. `while_waiting` is called after every `interval` seconds in
    which the consumer waits for an item.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        depth: int,
        name: str,
        while_waiting: Callable[[], None] = lambda: None,
        interval: float | None = None,
    ) -> None:
        self._items = items
        self._while_waiting, self._interval = while_waiting, interval
        self._ready: SimpleQueue[Item | _End] = SimpleQueue()
        self._free_places = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._produce, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                item = self._ready.get(timeout=self._interval)
            except Empty:
                self._while_waiting()
                continue
            if isinstance(item, _End):
                # A second iterator finds the same end, instead of an empty queue to wait for.
                self._ready.put(item)
                if item.error is not None:
                    raise item.error
                return
            self._free_places.release()
            yield item

    def __len__(self) -> int:
        """Items that are ready."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop after the current item and join the thread; iterators end after the items that are ready."""
        self._closed = True
        self._free_places.release()
        self._thread.join()

    def _produce(self) -> None:
        error = None
        try:
            self._free_places.acquire()
            for item in self._items:
                self._ready.put(item)
                self._free_places.acquire()
                if self._closed:
                    break
        except BaseException as raised:
            error = raised
        self._ready.put(_End(error))


class _End:
    """End of the items; `error` is the iterable's exception, if it raised one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

"""Calls that wait for a network, made side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ThreadMap:
    """A few threads that end with the process, whatever they wait for: an executor's would hold it up."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_missing = num_threads
        self._closed = False
        self._name = name

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the items' order, when all calls have ended; the first error among them is raised then."""
        calls = [self._called(function, item) for item in items]
        wait(calls)
        return [call.result() for call in calls]

    def close(self) -> None:
        """End the threads after what was asked of them so far; `map` is over."""
        with self._lock:
            self._closed = True
            self._calls.put(None)

    def _called(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        call: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: called after its end")
            self._calls.put((call, function, item))
            if self._num_missing:
                self._num_missing -= 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return call

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            call, function, item = work
            try:
                call.set_result(function(item))
            except BaseException as error:
                call.set_exception(error)
            del work, call, function, item  # the next wait may be long
        self._calls.put(None)  # for the next thread

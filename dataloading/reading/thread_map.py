"""A parallel `map` for calls that wait for a network."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ThreadMap:
    """A few daemon threads: unlike an executor's, they do not delay the exit of the process."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_unstarted = num_threads
        self._closed = False
        self._name = name

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the items' order; waits for all calls, then raises the first error among them."""
        calls = [self._submit(function, item) for item in items]
        wait(calls)
        return [call.result() for call in calls]

    def close(self) -> None:
        """End the threads after the calls submitted so far; `map` then raises `RuntimeError`."""
        with self._lock:
            self._closed = True
            self._calls.put(None)

    def _submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        call: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: called after close")
            self._calls.put((call, function, item))
            if self._num_unstarted:
                self._num_unstarted -= 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return call

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            call, function, item = work
            try:
                call.set_result(function(item))
            except BaseException as error:
                call.set_exception(error)
            del work, call, function, item  # the next wait may be long
        self._calls.put(None)  # ends the next thread

"""Worker processes that return results in the order of their tasks and end with their parent."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.synchronize import Event
from typing import Any, Protocol, TypeVar

from mcl_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_cancelled: Event | None = None  # in a worker process: its parent's event, set when the worker starts


class TaskCancelledError(Exception):
    """The parent no longer needs the result."""


def num_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Executor(Protocol):
    """Runs tasks and returns their results in the order of the tasks."""

    @property
    def description(self) -> dict[str, Any]:
        """The executor's fields in `build.json`."""

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> AbstractContextManager[Iterator[Result]]:
        """Yield results of `function` in the order of `items`; only a few are computed ahead."""


@dataclass(frozen=True)
class LocalExecutor:
    """Runs tasks in `workers` processes of this machine; see `ordered_map`."""

    workers: int

    @property
    def description(self) -> dict[str, Any]:
        """The executor's fields in `build.json`."""
        return {"executor": "local", "workers": self.workers}

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> AbstractContextManager[Iterator[Result]]:
        """`ordered_map` with these workers."""
        return ordered_map(function, items, self.workers)


@contextmanager
def ordered_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Iterator[Result]]:
    """Yield results of `function` in the order of `items`, computed by `workers` processes (1: this process).

    At most two results per worker are computed ahead. No worker outlives the block, however it ends.

    Raises:
        UserError: while iterating, when a worker died.
    """
    if workers == 1:
        yield map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    cancelled = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(cancelled,))
    try:
        yield _in_order(pool, function, items, 2 * workers)
    finally:
        cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)


def raise_if_cancelled() -> None:
    """Raise `TaskCancelledError` once the parent has left its block; long tasks call it from time to time."""
    if _cancelled is not None and _cancelled.is_set():
        raise TaskCancelledError


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item], num_ahead: int
) -> Iterator[Result]:
    waiting = iter(items)
    pending: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(waiting, num_ahead))
    try:
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(waiting, 1))
            yield result
    except BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps out of memory; give fewer --workers") from error


def _start_worker(cancelled: Event) -> None:
    global _cancelled
    _cancelled = cancelled
    exit_with_parent()


def exit_with_parent() -> None:
    """End this spawned process when its parent ends, and ignore Ctrl-C; call it once."""
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent_exit, daemon=True).start()


def _wait_for_parent_exit() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Worker processes whose results come in the order of their tasks, and that never outlive their parent."""

from __future__ import annotations

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

_stop: Event | None = None  # of this worker process; each is handed its parent's when it starts


class StoppedError(Exception):
    """The parent no longer wants the result."""


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Executor(Protocol):
    """What runs tasks somewhere, and hands their results out in the order of the tasks."""

    @property
    def description(self) -> dict[str, Any]:
        """What `build.json` says of it."""

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> AbstractContextManager[Iterator[Result]]:
        """Results of `function` in the order of `items`, few of them waiting to be taken."""


@dataclass(frozen=True)
class LocalExecutor:
    """Runs tasks in that many processes of this machine; see `ordered_map`."""

    workers: int

    @property
    def description(self) -> dict[str, Any]:
        """What `build.json` says of it."""
        return {"executor": "local", "workers": self.workers}

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> AbstractContextManager[Iterator[Result]]:
        """`ordered_map` with these workers."""
        return ordered_map(function, items, self.workers)


@contextmanager
def ordered_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Iterator[Result]]:
    """Results of `function` in the order of `items`, from `workers` processes (one: this process itself).

    At most two results a worker wait to be taken. Whatever ends the block, no worker is left behind.

    Raises:
        UserError: while iterating, when a worker died.
    """
    if workers == 1:
        yield map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,))
    try:
        yield _in_order(pool, function, items, 2 * workers)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def leave_if_stopped() -> None:
    """To be called now and then in long tasks: raises `StoppedError` once the parent has given up."""
    if _stop is not None and _stop.is_set():
        raise StoppedError


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
        raise UserError("a worker process died, perhaps for lack of memory; give fewer --workers") from error


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    follow_parent()


def follow_parent() -> None:
    """Let this process end with its parent, and at no other sign: to be called once by a process that was spawned."""
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

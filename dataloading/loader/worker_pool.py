"""Worker processes that do the steps of a long job ahead, in order, and hand arrays over in shared memory.

Nothing of them outlives the process that made them, however it ends: a worker leaves when its socket is hung up,
which the kernel does for the dead, and shared memory has no name.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from dataloading.loader.shared_memory import SharedArrays
from mcl_dist.errors import UserError

# Does one step: puts arrays into the room and returns what else there is to say, in JSON's types.
DoStep = Callable[[int, SharedArrays], dict[str, Any]]
_REPORT = "report"
_MESSAGE = 2**16  # bytes of the longest
_PATIENCE = 10.0  # seconds until a worker that does not leave is killed


class Done(NamedTuple):
    """What a worker made of a step: who it was, what it says, its arrays."""

    worker: int
    report: dict[str, Any]
    arrays: dict[str, np.ndarray]


class WorkerPool:
    """Workers that each do one step ahead, taking turns; iterate for their results in the steps' order.

    Args:
        start: called once in each worker; returns what does a step. It is sent to fresh interpreters, so it must
            be importable there.
        num_workers: at least 1.
        steps: what is to be done.

    Raises:
        UserError: while iterating, what a worker raised, or that it died.
    """

    def __init__(self, start: Callable[[], DoStep], num_workers: int, steps: Iterable[int]) -> None:
        self._steps = iter(steps)
        self._rooms: list[SharedArrays] = []
        self._free: deque[int] = deque()
        self._workers = [_Worker(start, number) for number in range(num_workers)]
        self._busy: deque[_Worker] = deque()
        for worker in self._workers:
            self._give_step(worker)

    def __iter__(self) -> Iterator[Done]:
        while self._busy:
            yield self._next_done()

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.wait()
        for room in self._rooms:
            room.close()
        self._rooms = []

    def _next_done(self) -> Done:
        worker = self._busy.popleft()
        places, room = worker.result()
        arrays = self._rooms[room].arrays(places, lambda: self._free.append(room))
        self._give_step(worker)
        return Done(worker.number, json.loads(arrays.pop(_REPORT).tobytes()), arrays)

    def _give_step(self, worker: _Worker) -> None:
        step = next(self._steps, None)
        if step is None:
            return
        if not self._free:
            self._rooms.append(SharedArrays())
            self._free.append(len(self._rooms) - 1)
        room = self._free.popleft()
        worker.do(step, room, self._rooms[room])
        self._busy.append(worker)


class _Worker:
    """One worker, seen from the process that made it."""

    def __init__(self, start: Callable[[], DoStep], number: int) -> None:
        self.number = number
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A fresh interpreter: threads, DALI and asynchronous filesystems do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_work, args=(start, theirs), daemon=True)
        with theirs:
            self._process.start()
        self._known: set[int] = set()
        self._room = -1

    def do(self, step: int, number: int, room: SharedArrays) -> None:
        """Have a step done in a room."""
        message = json.dumps({"step": step, "room": number}).encode()
        descriptors = [] if number in self._known else [room.descriptor]
        self._known.add(number)
        self._room = number
        try:
            socket.send_fds(self._socket, [message], descriptors)
        except OSError as error:
            raise self._died() from error

    def result(self) -> tuple[list[Any], int]:
        """Where the arrays of the step lie, and in which room."""
        try:
            message = self._socket.recv(_MESSAGE)
        except OSError as error:
            raise self._died() from error
        if not message:
            raise self._died()
        answer = json.loads(message)
        if "error" in answer:
            raise UserError(answer["error"])
        if "fault" in answer:
            raise RuntimeError(f"in loader worker {self.number}:\n{answer['fault']}")
        return answer["places"], self._room

    def hang_up(self) -> None:
        """Let the worker know that it is no longer needed, and whoever waits for it too."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Wait until the process has gone."""
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._socket.close()

    def _died(self) -> UserError:
        self._process.join(_PATIENCE)
        return UserError(
            f"loader worker {self.number} died (exit code {self._process.exitcode}), perhaps for lack of memory; "
            "give fewer data.workers"
        )


def _work(start: Callable[[], DoStep], parent: socket.socket) -> None:
    """A worker's life."""
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    rooms: dict[int, SharedArrays] = {}
    do_step: DoStep | None = None
    with suppress(OSError):  # of a socket that the parent has just hung up
        while True:
            message, descriptors, _, _ = socket.recv_fds(parent, _MESSAGE, 1)
            if not message:
                return
            task = json.loads(message)
            for descriptor in descriptors:  # one, when the room is new here
                rooms[task["room"]] = SharedArrays(descriptor)
            answer: dict[str, Any]
            try:
                do_step = do_step or start()
                answer = {"places": _done(do_step, task["step"], rooms[task["room"]])}
            except UserError as error:
                answer = {"error": str(error)}
            except Exception:
                answer = {"fault": traceback.format_exc()[-_MESSAGE // 2 :]}
            parent.send(json.dumps(answer).encode())


def _done(do_step: DoStep, step: int, room: SharedArrays) -> list[Any]:
    room.clear()
    report = do_step(step, room)
    room.put(_REPORT, np.frombuffer(json.dumps(report).encode(), dtype=np.uint8))
    return room.places


def _leave_with(parent: socket.socket) -> None:
    """End this process as soon as the other end of the socket is gone, whatever it is at."""
    waiting = select.poll()
    waiting.register(parent, 0)  # a hang-up is told without being asked for
    waiting.poll()
    os._exit(0)

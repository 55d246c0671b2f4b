"""Worker processes that compute the steps of a long job ahead, in order, and return arrays in shared memory.

A worker never outlives its parent: it exits when its socket is closed, which the kernel does for a dead parent,
and the shared memory is anonymous.
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

from dataloading.loader.shared_memory import ArraySpec, SharedArrays
from mcl_dist.errors import UserError

# Computes one step: puts arrays into the buffer and returns everything else, in JSON's types.
StepFunction = Callable[[int, SharedArrays], dict[str, Any]]
_REPORT = "report"
_MAX_MESSAGE_BYTES = 2**16
_EXIT_TIMEOUT = 10.0  # seconds until a worker that does not exit is killed


class StepResult(NamedTuple):
    """A worker's result for a step: number of the worker, what its function returned, its arrays."""

    worker: int
    report: dict[str, Any]
    arrays: dict[str, np.ndarray]


class WorkerPool:
    """Workers that compute one step each ahead, in round-robin order; iterating yields results in order of the steps.

    Args:
        start: called once in each worker; returns the function that computes a step. It is pickled for a fresh
            interpreter, so it must be importable there.
        num_workers: at least 1.
        steps: to compute.

    Raises:
        UserError: while iterating: a worker raised it, or a worker died.
    """

    def __init__(self, start: Callable[[], StepFunction], num_workers: int, steps: Iterable[int]) -> None:
        self._steps = iter(steps)
        self._buffers: list[SharedArrays] = []
        self._free: deque[int] = deque()
        self._workers = [_Worker(start, number) for number in range(num_workers)]
        self._busy: deque[_Worker] = deque()
        for worker in self._workers:
            self._submit_next(worker)

    def __iter__(self) -> Iterator[StepResult]:
        while self._busy:
            yield self._next_result()

    @property
    def num_buffers(self) -> int:
        """Shared-memory buffers in use or free for reuse."""
        return len(self._buffers)

    def close(self) -> None:
        """Stop all workers at once."""
        for worker in self._workers:
            worker.disconnect()
        for worker in self._workers:
            worker.join()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _next_result(self) -> StepResult:
        worker = self._busy.popleft()
        specs, buffer = worker.result()
        arrays = self._buffers[buffer].views(specs, lambda: self._free.append(buffer))
        self._submit_next(worker)
        return StepResult(worker.number, json.loads(arrays.pop(_REPORT).tobytes()), arrays)

    def _submit_next(self, worker: _Worker) -> None:
        step = next(self._steps, None)
        if step is None:
            return
        if not self._free:
            self._buffers.append(SharedArrays())
            self._free.append(len(self._buffers) - 1)
        number = self._free.popleft()
        worker.submit(step, number, self._buffers[number])
        self._busy.append(worker)


class _Worker:
    """One worker, seen from its parent process."""

    def __init__(self, start: Callable[[], StepFunction], number: int) -> None:
        self.number = number
        self._socket, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A fresh interpreter: threads, DALI and asynchronous filesystems do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_run_worker, args=(start, child_socket), daemon=True)
        with child_socket:
            self._process.start()
        self._sent_buffers: set[int] = set()
        self._buffer = -1

    def submit(self, step: int, number: int, buffer: SharedArrays) -> None:
        """Start a step whose arrays go into a buffer, identified by its number."""
        message = json.dumps({"step": step, "buffer": number}).encode()
        descriptors = [] if number in self._sent_buffers else [buffer.descriptor]
        self._sent_buffers.add(number)
        self._buffer = number
        try:
            socket.send_fds(self._socket, [message], descriptors)
        except OSError as error:
            raise self._died() from error

    def result(self) -> tuple[list[ArraySpec], int]:
        """Wait for the step; returns its arrays' specs and the number of its buffer."""
        try:
            message = self._socket.recv(_MAX_MESSAGE_BYTES)
        except OSError as error:
            raise self._died() from error
        if not message:
            raise self._died()
        answer = json.loads(message)
        if "error" in answer:
            raise UserError(answer["error"])
        if "traceback" in answer:
            raise RuntimeError(f"in loader worker {self.number}:\n{answer['traceback']}")
        return answer["specs"], self._buffer

    def disconnect(self) -> None:
        """Shut the socket down: the worker exits, and a thread that waits for its result gets an error."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait until the process has exited; kill it after a timeout."""
        self._process.join(_EXIT_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._socket.close()

    def _died(self) -> UserError:
        self._process.join(_EXIT_TIMEOUT)
        return UserError(
            f"loader worker {self.number} died (exit code {self._process.exitcode}), possibly out of memory; "
            "reduce data.workers"
        )


def _run_worker(start: Callable[[], StepFunction], parent: socket.socket) -> None:
    """The main function of a worker: answer requests until the parent disconnects."""
    # Ctrl-C reaches the whole process group; only the parent reacts to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    buffers: dict[int, SharedArrays] = {}
    function: StepFunction | None = None
    with suppress(OSError):  # the parent has just disconnected
        while True:
            message, descriptors, _, _ = socket.recv_fds(parent, _MAX_MESSAGE_BYTES, 1)
            if not message:
                return
            request = json.loads(message)
            for descriptor in descriptors:  # one, if the buffer is new to this worker
                buffers[request["buffer"]] = SharedArrays(descriptor)
            answer: dict[str, Any]
            try:
                function = function or start()
                answer = {"specs": _compute(function, request["step"], buffers[request["buffer"]])}
            except UserError as error:
                answer = {"error": str(error)}
            except Exception:
                answer = {"traceback": traceback.format_exc()[-_MAX_MESSAGE_BYTES // 2 :]}
            parent.send(json.dumps(answer).encode())


def _compute(function: StepFunction, step: int, buffer: SharedArrays) -> list[ArraySpec]:
    buffer.clear()
    report = function(step, buffer)
    buffer.put(_REPORT, np.frombuffer(json.dumps(report).encode(), dtype=np.uint8))
    return buffer.specs


def _exit_with_parent(parent: socket.socket) -> None:
    """Exit this process at once when the other end of the socket is closed."""
    poll = select.poll()
    poll.register(parent, 0)  # a hang-up is reported without a request for it
    poll.poll()
    os._exit(0)

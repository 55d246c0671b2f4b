"""A light job for worker processes, and a process that has it done: what the tests of crews start and kill."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np

from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.worker_pool import DoStep, WorkerPool
from mcl_dist.errors import UserError


def start() -> DoStep:
    """Puts the step's number into 1000 places."""

    def do_step(step: int, room: SharedArrays) -> dict[str, Any]:
        room.array("numbers", (10, 100), np.int32)[:] = step
        return {"pid": os.getpid()}

    return do_step


def start_refusing() -> DoStep:
    """Refuses step 2."""

    def do_step(step: int, room: SharedArrays) -> dict[str, Any]:
        if step == 2:
            raise UserError("step 2 is too much")
        room.array("numbers", (1,), np.int32)[:] = step
        return {}

    return do_step


def train() -> None:
    """Have endless steps done by two workers; says on standard output when the first is."""
    for done in WorkerPool(start, 2, itertools.count()):
        if done.report and done.arrays["numbers"][0, 0] == 0:
            print("working", flush=True)

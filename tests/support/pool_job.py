"""A small job for worker processes, and a parent process that runs it: the tests of the worker pool kill both."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np

from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.worker_pool import StepFunction, WorkerPool
from mcl_dist.errors import UserError


def start() -> StepFunction:
    """A function that fills an array of 1000 numbers with the step."""

    def fill(step: int, buffer: SharedArrays) -> dict[str, Any]:
        buffer.allocate("numbers", (10, 100), np.int32)[:] = step
        return {"pid": os.getpid()}

    return fill


def start_failing() -> StepFunction:
    """A function that fails at step 2."""

    def fill_or_fail(step: int, buffer: SharedArrays) -> dict[str, Any]:
        if step == 2:
            raise UserError("step 2 is too much")
        buffer.allocate("numbers", (1,), np.int32)[:] = step
        return {}

    return fill_or_fail


def train() -> None:
    """Run endless steps in two workers; print a line after the first."""
    for result in WorkerPool(start, 2, itertools.count()):
        if result.report and result.arrays["numbers"][0, 0] == 0:
            print("working", flush=True)

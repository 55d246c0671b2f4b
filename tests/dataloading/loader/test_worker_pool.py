from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataloading.loader.worker_pool import WorkerPool
from mcl_dist.errors import UserError
from tests.support.paths import REPOSITORY
from tests.support.pool_job import start, start_refusing

ROUNDS, AT_ONCE = 20, 5


def wait_until(true: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        os.sched_yield()  # a kill takes a moment
    return true()


def shared_segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def processes_of(session: int) -> list[int]:
    """Living processes of a session; those that are dead and not yet waited for do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def test_results_come_in_the_order_of_the_steps() -> None:
    crew = WorkerPool(start, 3, range(12))
    try:
        assert [int(done.arrays["numbers"][9, 99]) for done in crew] == list(range(12))
    finally:
        crew.close()


def test_memory_is_used_again_only_when_nobody_has_its_arrays() -> None:
    crew = WorkerPool(start, 1, range(30))
    try:
        done = iter(crew)
        kept = [torch.from_numpy(next(done).arrays["numbers"])[1:3] for _ in range(5)]
        rest = sum(1 for _ in done)
        assert rest == 25
        assert all((tensor == step).all() for step, tensor in enumerate(kept))
        assert len(crew._rooms) <= 5 + 3
    finally:
        crew.close()


def test_what_a_worker_raises_is_raised_where_results_are_taken() -> None:
    crew = WorkerPool(start_refusing, 2, range(5))
    try:
        done = iter(crew)
        assert [next(done).arrays["numbers"][0] for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="step 2 is too much"):
            next(done)
    finally:
        crew.close()


@pytest.mark.slow
def test_a_hundred_killed_workers_are_told_and_leave_nothing() -> None:
    before = shared_segments()
    for _ in range(ROUNDS):
        crews = [WorkerPool(start, 1, range(10**6)) for _ in range(AT_ONCE)]
        try:
            for crew in crews:
                taken = iter(crew)
                os.kill(next(taken).report["pid"], signal.SIGKILL)
                with pytest.raises(UserError, match=r"loader worker 0 died \(exit code -9\)"):
                    sum(1 for _ in taken)
        finally:
            for crew in crews:
                crew.close()
    assert shared_segments() == before


@pytest.mark.slow
def test_a_hundred_killed_trainers_leave_no_process_and_no_shared_memory() -> None:
    before = shared_segments()
    command = [sys.executable, "-c", "from tests.support.pool_job import train; train()"]
    for _ in range(ROUNDS):
        trainers = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(AT_ONCE)
        ]
        for number, trainer in enumerate(trainers):
            with trainer:
                assert trainer.stdout is not None
                if number:  # the first is killed while its workers start
                    trainer.stdout.readline()
                trainer.kill()
        for trainer in trainers:
            assert wait_until(lambda session=trainer.pid: not processes_of(session)), trainer.pid
    assert shared_segments() == before

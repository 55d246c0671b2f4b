from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataloading.loader.worker_pool import WorkerPool
from launch.supervision.processes import wait_until
from mcl_dist.errors import UserError
from tests.support.paths import REPOSITORY
from tests.support.pool_job import start, start_failing

ROUNDS, PER_ROUND = 20, 5


def shared_segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def processes_of(session: int) -> list[int]:
    """Living processes of a session, without zombies."""
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
    pool = WorkerPool(start, 3, range(12))
    try:
        assert [int(result.arrays["numbers"][9, 99]) for result in pool] == list(range(12))
    finally:
        pool.close()


def test_a_buffer_is_reused_only_when_its_arrays_are_freed() -> None:
    pool = WorkerPool(start, 1, range(30))
    try:
        results = iter(pool)
        kept = [torch.from_numpy(next(results).arrays["numbers"])[1:3] for _ in range(5)]
        rest = sum(1 for _ in results)
        assert rest == 25
        assert all((tensor == step).all() for step, tensor in enumerate(kept))
        assert pool.num_buffers <= 5 + 3
    finally:
        pool.close()


def test_an_error_of_a_worker_is_raised_in_the_consumer() -> None:
    pool = WorkerPool(start_failing, 2, range(5))
    try:
        results = iter(pool)
        assert [next(results).arrays["numbers"][0] for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="step 2 is too much"):
            next(results)
    finally:
        pool.close()


@pytest.mark.slow
def test_a_hundred_killed_workers_are_reported_and_leave_nothing() -> None:
    before = shared_segments()
    for _ in range(ROUNDS):
        pools = [WorkerPool(start, 1, range(10**6)) for _ in range(PER_ROUND)]
        try:
            for pool in pools:
                results = iter(pool)
                os.kill(next(results).report["pid"], signal.SIGKILL)
                with pytest.raises(UserError, match=r"loader worker 0 died \(exit code -9\)"):
                    sum(1 for _ in results)
        finally:
            for pool in pools:
                pool.close()
    assert shared_segments() == before


@pytest.mark.slow
def test_a_hundred_killed_parents_leave_no_process_and_no_shared_memory() -> None:
    before = shared_segments()
    command = [sys.executable, "-c", "from tests.support.pool_job import train; train()"]
    for _ in range(ROUNDS):
        parents = [
            subprocess.Popen(
                command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for _ in range(PER_ROUND)
        ]
        for number, parent in enumerate(parents):
            with parent:
                assert parent.stdout is not None
                if number:  # the first one is killed while its workers start
                    parent.stdout.readline()
                parent.kill()
        for parent in parents:
            assert wait_until(lambda session=parent.pid: not processes_of(session), 30), parent.pid
    assert shared_segments() == before

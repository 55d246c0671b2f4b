"""Runs on two ranks with checkpoints in Swift, whose proxy is killed while checkpoints are written."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from mcl_dist.batch import TubeletBatch
from mcl_dist.checkpoint import (
    COMMITTED,
    CheckpointConfig,
    CheckpointManager,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    read_snapshot,
    writer,
)
from mcl_dist.checkpoint.format import NETWORK, STATE, step_folder, steps_in
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointFailed, CheckpointWritten, Event, Notice, StepDone
from mcl_dist.storage import folder as storage
from mcl_dist.storage import store_requests
from mcl_dist.storage.folder import Folder
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from mcl_dist.training.pretrain_step import PretrainTrainer
from tests.support.gloo_runs import build_trainer, join_ranks, noise
from tests.support.s3 import S3Store, running_store

EVERY = 3
OUTAGE_STEPS = 8  # steps before the proxy restarts; two checkpoints become due
LONG_RETRY, SHORT_RETRY = 200.0, 1.0  # seconds
MOMENTS = (("before", STATE), ("during", "optimizer-00000.safetensors"), ("during", COMMITTED), ("after", COMMITTED))


@dataclass
class Outages:
    """Kills the proxy while the first rank saves, once per checkpoint, and restarts it some steps later.

    Attributes:
        moments: remaining moments to kill at: before, during or after the write of a file.
        events: all events of the run, in order.
        is_over: whether a killed proxy may restart.
        killed_at: step during which the proxy was killed; None while it runs.
        back_at: step at which it was last back.
        num_over: past outages.
        last_target: checkpoint of the last outage.
    """

    store: S3Store
    moments: list[tuple[str, str]]
    events: list[Event] = field(default_factory=list)
    is_over: Callable[[Outages], bool] = lambda outages: outages.outage_steps >= OUTAGE_STEPS
    step: int = 0
    killed_at: int | None = None
    back_at: int | None = None
    num_over: int = 0
    last_target: str = ""
    is_active: bool = False
    is_starting: bool = False

    @property
    def outage_steps(self) -> int:
        return 0 if self.killed_at is None else self.step - self.killed_at

    def watch_writes(self) -> None:
        """Intercept every request to the store."""
        request, draw = storage.request, random.Random(6)

        def interrupted(filesystem: Any, method: str, *arguments: Any, **options: Any) -> Any:
            moment = self.moments[0] if self.moments else ("", "")
            checkpoint, _, name = str(arguments[0]).rpartition("/") if method == "pipe_file" else ("", "", None)
            if self.is_active or checkpoint == self.last_target or name != moment[1]:
                return request(filesystem, method, *arguments, **options)
            self.is_active, self.last_target = True, checkpoint
            del self.moments[0]
            if moment[0] == "before":
                self._kill()
            elif moment[0] == "during":
                threading.Timer(draw.uniform(0.001, 0.02), self._kill).start()
            result = request(filesystem, method, *arguments, **options)
            if moment[0] == "after":
                self._kill()
            return result

        storage.request = interrupted

    def on_step(self, step: int) -> None:
        """Called only by the training loop: if that waited for the store, the proxy would never restart."""
        self.step = step
        if self.killed_at is None:
            return
        if not self.is_starting and self.is_over(self):
            self.store.start_proxy()
            self.is_starting = True
        elif self.is_starting and self.store.answers:
            self.killed_at, self.back_at, self.num_over = None, step, self.num_over + 1
            self.is_starting = self.is_active = False

    def _kill(self) -> None:
        self.store.kill_proxy()
        self.killed_at = self.step


class Reader:
    """Reads every checkpoint as soon as it is complete, in a thread."""

    def __init__(self, url: str) -> None:
        self.complete: set[int] = set()
        self.corrupt: list[str] = []
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop, then read all checkpoints once more."""
        self._ended.set()
        self._thread.join()
        self.complete.clear()
        self._read_all()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            self._read_all()

    def _read_all(self) -> None:
        for step in sorted({*steps_in(Folder(self._url))} - self.complete):
            url = f"{self._url}/{step_folder(step)}"
            try:
                assert read_snapshot(url).step == step
                self.complete.add(step)
            except IncompleteCheckpointError:
                pass  # recognisable as such
            except CorruptCheckpointError as error:
                self.corrupt.append(str(error))


def train(
    url: str, group: ProcessGroup, settings: CheckpointConfig, outages: Outages, is_done: Callable[[], bool]
) -> PretrainTrainer:
    """Train from the newest checkpoint until `is_done` on the first rank."""

    def batches(start: int) -> Iterator[TubeletBatch]:
        for step, batch in enumerate(noise(group, start), start=start + 1):
            if group.is_first:
                outages.on_step(step)
                if is_done():
                    trainer.stop.request("all outages are over")
            yield batch

    trainer = build_trainer(url, group, OptimizerConfig(learning_rate=0.01), batches, steps=10_000)
    trainer.checkpoints = CheckpointManager(f"{url}/checkpoints", group, settings)
    trainer.checkpoint_every = EVERY
    trainer.listeners = [outages.events.append]
    assert not trainer.fit()
    return trainer


def proxy_comes_and_goes(url: str, group: ProcessGroup, store: S3Store) -> None:
    """Outages that end within the retry time: no checkpoint fails."""
    outages = Outages(store, list(MOMENTS))
    if group.is_first:
        outages.watch_writes()
        reader = Reader(f"{url}/checkpoints")
    settings = CheckpointConfig(keep=999, retry_seconds=LONG_RETRY)
    trainer = train(url, group, settings, outages, lambda: outages.num_over == len(MOMENTS))
    if not group.is_first:
        return
    reader.end()
    written = [event for event in outages.events if isinstance(event, CheckpointWritten)]
    assert reader.corrupt == []
    assert reader.complete == {event.step for event in written}
    assert max(event.seconds for event in written) < LONG_RETRY / 2
    assert not any(isinstance(event, CheckpointFailed) for event in outages.events)
    delayed = [event for event in outages.events if isinstance(event, Notice) and "the store delays" in event.text]
    assert len(delayed) >= len(MOMENTS) - 1
    assert max(reader.complete) == trainer.checkpoints.newest_step


def proxy_stays_away(url: str, group: ProcessGroup, store: S3Store) -> None:
    """An outage beyond the retry time: a checkpoint fails, and later ones succeed."""
    writer.CLEANUP_SECONDS = SHORT_RETRY
    outages = Outages(
        store,
        [("before", NETWORK)],
        is_over=lambda self: any(isinstance(event, CheckpointFailed) for event in self.events),
    )
    if group.is_first:
        outages.watch_writes()
        reader = Reader(f"{url}/checkpoints")
    settings = CheckpointConfig(keep=999, retry_seconds=SHORT_RETRY, max_failures=99)

    def results() -> list[CheckpointWritten | CheckpointFailed]:
        return [event for event in outages.events if isinstance(event, CheckpointWritten | CheckpointFailed)]

    def after_outage() -> list[CheckpointWritten | CheckpointFailed]:
        return [event for event in results() if outages.back_at is not None and event.step > outages.back_at]

    trainer = train(url, group, settings, outages, lambda: bool(after_outage()))
    if not group.is_first:
        return
    reader.end()
    assert reader.corrupt == []
    first_failure = next(event for event in results() if isinstance(event, CheckpointFailed))
    assert first_failure.in_a_row == 1
    assert all(isinstance(event, CheckpointWritten) for event in after_outage())
    assert {event.step for event in results() if isinstance(event, CheckpointFailed)}.isdisjoint(reader.complete)
    steps = [event.step for event in outages.events if isinstance(event, StepDone)]
    assert steps == list(range(trainer.start + 1, steps[-1] + 1))
    assert max(reader.complete) == trainer.checkpoints.newest_step


def two_runs(folder: str) -> None:
    store_requests.LONGEST_WAIT = 1.0
    group = join_ranks()
    if not group.is_first:
        run_both(group, S3Store(Path(folder), group.from_first(0), {}))
        return
    with running_store(Path(folder)) as store:
        group.from_first(store.port)
        run_both(group, store)


def run_both(group: ProcessGroup, store: S3Store) -> None:
    from s3fs import S3FileSystem

    os.environ.update(store.environment)
    if group.is_first:
        S3FileSystem().mkdir("runs")
    group.barrier()
    proxy_comes_and_goes("s3://runs/first", group, store)
    group.barrier()
    proxy_stays_away("s3://runs/first", group, store)
    group.barrier()


@pytest.mark.slow
def test_runs_continue_through_outages_of_the_store_and_every_complete_checkpoint_is_valid(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "two_runs", 2, tmp_path)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo sometimes aborts at shutdown

"""Whole runs on two ranks with checkpoints in Swift, whose proxy is killed while they are written."""

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
from mcl_dist.checkpoint import COMMITTED, CheckpointConfig, CheckpointManager, DamagedError, TornError, read_snapshot
from mcl_dist.checkpoint import writer as write_module
from mcl_dist.checkpoint.format import NETWORK, STATE, step_folder, steps_in
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointFailed, CheckpointWritten, Event, Notice, StepDone
from mcl_dist.storage import folder as storage
from mcl_dist.storage import store_requests as remote
from mcl_dist.storage.folder import Folder
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from mcl_dist.training.pretrain_step import PretrainTrainer
from tests.support.gloo_runs import joined, noise, put_together
from tests.support.s3 import S3Store, running_store

EVERY = 3
STEPS_WITHOUT = 8  # that are taken before the proxy comes back: two checkpoints come due
PATIENT, IMPATIENT = 200.0, 1.0  # seconds
MOMENTS = (
    ("before", STATE),
    ("during", "optimizer-00000.safetensors"),
    ("during", COMMITTED),
    ("after", COMMITTED),
)


@dataclass
class Outages:
    """Kills the proxy at moments of the first rank's saving, one a checkpoint; starts it again some steps later.

    Attributes:
        moments: to come.
        heard: all events, in order.
        is_over: whether a killed one may come back.
        killed_at, back_at: the last step begun then; None when that is not so.
        num_over: outages that have passed.
        struck: the checkpoint whose moment the last one was.
    """

    store: S3Store
    moments: list[tuple[str, str]]
    heard: list[Event] = field(default_factory=list)
    is_over: Callable[[Outages], bool] = lambda outages: outages.steps_without >= STEPS_WITHOUT
    step: int = 0
    killed_at: int | None = None
    back_at: int | None = None
    num_over: int = 0
    struck: str = ""
    is_striking: bool = False
    is_starting: bool = False

    @property
    def steps_without(self) -> int:
        return 0 if self.killed_at is None else self.step - self.killed_at

    def watch(self) -> None:
        """Meet every file that the writing thread puts into the store."""
        ask, draw = storage.asked, random.Random(6)

        def asked(filesystem: Any, method: str, *arguments: Any, **how: Any) -> Any:
            moment = self.moments[0] if self.moments else ("", "")
            checkpoint, _, name = str(arguments[0]).rpartition("/") if method == "pipe_file" else ("", "", None)
            if self.is_striking or checkpoint == self.struck or name != moment[1]:
                return ask(filesystem, method, *arguments, **how)
            self.is_striking, self.struck = True, checkpoint
            del self.moments[0]
            if moment[0] == "before":
                self._kill()
            elif moment[0] == "during":
                threading.Timer(draw.uniform(0.001, 0.02), self._kill).start()
            result = ask(filesystem, method, *arguments, **how)
            if moment[0] == "after":
                self._kill()
            return result

        storage.asked = asked

    def meet_step(self, step: int) -> None:
        """Called by the training loop alone: were it to wait for the store, the proxy would never come back."""
        self.step = step
        if self.killed_at is None:
            return
        if not self.is_starting and self.is_over(self):
            self.store.start_proxy()
            self.is_starting = True
        elif self.is_starting and self.store.answers:
            self.killed_at, self.back_at, self.num_over = None, step, self.num_over + 1
            self.is_starting = self.is_striking = False

    def _kill(self) -> None:
        self.store.kill_proxy()
        self.killed_at = self.step


class Reader:
    """Reads every checkpoint that looks complete as soon as it does, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.whole: set[int] = set()
        self.damaged: list[str] = []
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look a last time, at all."""
        self._ended.set()
        self._thread.join()
        self.whole.clear()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            self._look()

    def _look(self) -> None:
        for step in sorted({*steps_in(Folder(self._url))} - self.whole):
            url = f"{self._url}/{step_folder(step)}"
            try:
                assert read_snapshot(url).step == step
                self.whole.add(step)
            except TornError:
                pass  # which anybody sees that it is
            except DamagedError as error:
                self.damaged.append(str(error))


def trained(
    url: str, group: ProcessGroup, settings: CheckpointConfig, outages: Outages, is_done: Callable[[], bool]
) -> PretrainTrainer:
    """Train from the newest checkpoint until the first rank says that it is done."""

    def batches(start: int) -> Iterator[TubeletBatch]:
        for step, batch in enumerate(noise(group, start), start=start + 1):
            if group.is_first:
                outages.meet_step(step)
                if is_done():
                    trainer.stop.ask("all moments have passed")
            yield batch

    trainer = put_together(url, group, OptimizerConfig(learning_rate=0.01), batches, steps=10_000)
    trainer.checkpoints = CheckpointManager(f"{url}/checkpoints", group, settings)
    trainer.checkpoint_every = EVERY
    trainer.listeners = [outages.heard.append]
    assert not trainer.fit()
    return trainer


def proxy_comes_and_goes(url: str, group: ProcessGroup, store: S3Store) -> None:
    """Outages, each of which ends in time."""
    outages = Outages(store, list(MOMENTS))
    if group.is_first:
        outages.watch()
        reader = Reader(f"{url}/checkpoints")
    settings = CheckpointConfig(keep=999, retry_seconds=PATIENT)
    trainer = trained(url, group, settings, outages, lambda: outages.num_over == len(MOMENTS))
    if not group.is_first:
        return
    reader.end()
    written = [event for event in outages.heard if isinstance(event, CheckpointWritten)]
    assert reader.damaged == []
    assert reader.whole == {event.step for event in written}
    assert max(event.seconds for event in written) < PATIENT / 2
    assert not any(isinstance(event, CheckpointFailed) for event in outages.heard)
    owed = [event for event in outages.heard if isinstance(event, Notice) and "holds up" in event.text]
    assert len(owed) >= len(MOMENTS) - 1
    assert max(reader.whole) == trainer.checkpoints.newest_step


def proxy_stays_away(url: str, group: ProcessGroup, store: S3Store) -> None:
    """An outage that ends only when the run has been told of the failure."""
    write_module.CLEANING_SECONDS = IMPATIENT
    outages = Outages(
        store,
        [("before", NETWORK)],
        is_over=lambda self: any(isinstance(event, CheckpointFailed) for event in self.heard),
    )
    if group.is_first:
        outages.watch()
        reader = Reader(f"{url}/checkpoints")
    settings = CheckpointConfig(keep=999, retry_seconds=IMPATIENT, max_failures=99)

    def results() -> list[CheckpointWritten | CheckpointFailed]:
        return [event for event in outages.heard if isinstance(event, CheckpointWritten | CheckpointFailed)]

    def after_it() -> list[CheckpointWritten | CheckpointFailed]:
        return [event for event in results() if outages.back_at is not None and event.step > outages.back_at]

    trainer = trained(url, group, settings, outages, lambda: bool(after_it()))
    if not group.is_first:
        return
    reader.end()
    assert reader.damaged == []
    first_failure = next(event for event in results() if isinstance(event, CheckpointFailed))
    assert first_failure.in_a_row == 1
    assert all(isinstance(event, CheckpointWritten) for event in after_it())
    assert {event.step for event in results() if isinstance(event, CheckpointFailed)}.isdisjoint(reader.whole)
    steps = [event.step for event in outages.heard if isinstance(event, StepDone)]
    assert steps == list(range(trainer.start + 1, steps[-1] + 1))
    assert max(reader.whole) == trainer.checkpoints.newest_step


def two_runs(folder: str) -> None:
    remote.LONGEST_WAIT = 1.0
    group = joined()
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
def test_runs_train_on_while_the_store_is_away_and_no_checkpoint_in_it_is_ever_torn(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "two_runs", 2, tmp_path)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

"""How long training stands still for a checkpoint: written while it waits, and behind its steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from launch.benchmarks.step_forms import LogSumExpForm, lone_trainer, noise
from launch.run.config import PretrainConfig
from mcl_dist.checkpoint import CheckpointManager
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointWritten, Event
from mcl_dist.training.deepspeed_engine import pick_device
from mcl_dist.training.phase_timer import PhaseTimer

VIDEOS, CROP = 1, 112  # of a step: the shorter it is, the less of a copy it hides


@dataclass(frozen=True)
class CheckpointResult:
    """What a checkpoint costs, one rank alone.

    Attributes:
        bytes: of its files.
        synchronous_seconds: that training stands still when it waits until all is written and synced; median.
        stall_seconds: that it stands still when that is done behind its steps: while the checkpoint is begun, and
            before the next step's update, until all is copied that this changes; median.
        waited_seconds: of these, those before the update; median.
        stall_ratio: of stall and synchronous; the median over rounds, the largest is `worst_stall_ratio`.
        told_seconds: what a run's `CheckpointWritten` says of the stall; median.
        background_seconds: until a checkpoint is complete while training goes on; median.
        step_seconds: of a step, of one video of 112 pixels at the most, with no checkpoint being written; median.
        step_seconds_beside: of a step while one is copied or written; median.
    """

    bytes: int
    synchronous_seconds: float
    stall_seconds: float
    waited_seconds: float
    stall_ratio: float
    worst_stall_ratio: float
    told_seconds: float
    background_seconds: float
    step_seconds: float
    step_seconds_beside: float


def benchmark(config: PretrainConfig, folder: str | None, rounds: int, say: Callable[[str], None]) -> CheckpointResult:
    """Save in both ways by turns, between steps of `mcl pretrain`'s own, after a first save that counts for neither.

    Args:
        config: whose networks, queue and optimizer are saved.
        folder: URL to save to; none is a temporary folder.
        rounds: saves of each kind.
        say: is told of each.

    Raises:
        UserError: when the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        return _Bench(config, folder or temporary).run(rounds, say)


class _Bench:
    def __init__(self, config: PretrainConfig, folder: str) -> None:
        config = replace(
            config,
            train=replace(config.train, global_batch=VIDEOS, accumulate=1),
            data=replace(config.data, crop=min(CROP, config.data.crop)),
        )
        self._device = pick_device()
        settings = replace(config.checkpoint, keep=1, keep_every=None)
        self._checkpoints = CheckpointManager(folder, ProcessGroup(self._device), settings)
        form = LogSumExpForm("trainer", bfloat16=config.train.precision == "bfloat16")
        self._trainer = lone_trainer(config, form, self._device, self._checkpoints)
        self._batch = noise(config, self._device).to(self._device)
        self._written: list[CheckpointWritten] = []
        self._trainer.listeners = [self._hear]
        self._steps = 0

    def run(self, rounds: int, say: Callable[[str], None]) -> CheckpointResult:
        self._step()
        self._save_and_wait()  # makes the host memory, as a run does at its start
        alone = [self._step()[0] for _ in range(rounds)]
        synchronous, stalls, waits, behind, beside = [], [], [], [], []
        for number in range(1, rounds + 1):
            synchronous.append(self._save_and_wait())
            self._step()
            start, saved = time.perf_counter(), self._steps
            self._trainer.save_soon(saved)
            begun = time.perf_counter() - start
            seconds, waited = self._step()
            beside.append(seconds)
            while self._checkpoints.is_writing:
                beside.append(self._step()[0])
            behind.append(time.perf_counter() - start)
            self._trainer.save_and_wait(saved)  # it is: this tells of it
            stalls.append(begun + waited)
            waits.append(waited)
            say(
                f"round {number}: {synchronous[-1]:.2f} s when waiting; behind the steps {begun * 1e3:.1f} ms to begin "
                f"and {waited * 1e3:.1f} ms before the update"
            )
        ratios = [stall / wait for stall, wait in zip(stalls, synchronous, strict=True)]
        return CheckpointResult(
            bytes=self._written[-1].bytes,
            synchronous_seconds=median(synchronous),
            stall_seconds=median(stalls),
            waited_seconds=median(waits),
            stall_ratio=median(ratios),
            worst_stall_ratio=max(ratios),
            told_seconds=median(written.stall_seconds for written in self._written[2::2]),
            background_seconds=median(behind),
            step_seconds=median(alone),
            step_seconds_beside=median(beside),
        )

    def _save_and_wait(self) -> float:
        start = time.perf_counter()
        self._trainer.save_and_wait(self._steps)
        return time.perf_counter() - start

    def _step(self) -> tuple[float, float]:
        """Take a step, and wait for the device: its seconds, and those that it stood still for a checkpoint's copy."""
        start, clock = time.perf_counter(), PhaseTimer(self._device)
        pending = self._trainer.take(self._steps, self._batch, clock, waited=0.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        pending.seconds = time.perf_counter() - start
        self._steps += 1
        return pending.seconds, clock.seconds()["checkpoint"]

    def _hear(self, event: Event) -> None:
        if isinstance(event, CheckpointWritten):
            self._written.append(event)

"""Time for which a checkpoint blocks training, written synchronously and in the background."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from launch.benchmarks.step_variants import StepVariant, noise, single_rank_trainer
from launch.run.config import PretrainConfig
from mcl_dist.checkpoint import CheckpointManager
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointWritten, Event
from mcl_dist.training.deepspeed_engine import pick_device
from mcl_dist.training.phase_timer import PhaseTimer

VIDEOS, CROP = 1, 112  # of a step; a short step hides less of the copy


@dataclass(frozen=True)
class CheckpointResult:
    """Cost of a checkpoint on a single rank; seconds are medians over rounds.

    Attributes:
        bytes: of all files.
        synchronous_seconds: for which training is blocked when it waits until everything is written and synced.
        stall_seconds: for which training is blocked when a background thread writes: while the checkpoint begins, and
            before the next update until the tensors that it changes are copied.
        waited_seconds: the part of `stall_seconds` before the update.
        stall_ratio: stall over synchronous seconds, median over rounds.
        worst_stall_ratio: the largest ratio of all rounds.
        told_seconds: the stall that a run's `CheckpointWritten` event reports.
        background_seconds: until a background checkpoint is complete.
        step_seconds: of a step (one video of at most 112 pixels) while no checkpoint is written.
        step_seconds_beside: of a step while a checkpoint is copied or written.
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


def measure_checkpoint(
    config: PretrainConfig, folder: str | None, rounds: int, log: Callable[[str], None]
) -> CheckpointResult:
    """Save `rounds` times in each way between steps of `mcl pretrain`, after a first save that does not count.

    Without a URL, `folder` is a temporary one; raises UserError if it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        return _CheckpointBenchmark(config, folder or temporary).run(rounds, log)


@dataclass(frozen=True)
class _Round:
    synchronous: float
    begin: float
    wait: float
    background: float
    steps_beside: list[float]

    @property
    def stall(self) -> float:
        return self.begin + self.wait


class _CheckpointBenchmark:
    def __init__(self, config: PretrainConfig, folder: str) -> None:
        train = replace(config.train, global_batch=VIDEOS, accumulate=1)
        config = replace(config, train=train, data=replace(config.data, crop=min(CROP, config.data.crop)))
        self._device = pick_device()
        settings = replace(config.checkpoint, keep=1, keep_every=None)
        self._checkpoints = CheckpointManager(folder, ProcessGroup(self._device), settings)
        variant = StepVariant("trainer", bfloat16=config.train.precision == "bfloat16")
        self._trainer = single_rank_trainer(config, variant, self._device, self._checkpoints)
        self._batch = noise(config, self._device).to(self._device)
        self._written: list[CheckpointWritten] = []
        self._trainer.listeners = [self._on_event]
        self._steps = 0

    def run(self, rounds: int, log: Callable[[str], None]) -> CheckpointResult:
        self._step()
        self._save_and_wait()  # allocates the host memory, as a run does at its start
        alone = [self._step()[0] for _ in range(rounds)]
        measured = []
        for number in range(1, rounds + 1):
            measured.append(self._round())
            log(
                f"round {number}: {measured[-1].synchronous:.2f} s when waiting; in the background "
                f"{measured[-1].begin * 1e3:.1f} ms to begin and {measured[-1].wait * 1e3:.1f} ms before the update"
            )
        ratios = [each.stall / each.synchronous for each in measured]
        return CheckpointResult(
            bytes=self._written[-1].bytes,
            synchronous_seconds=median(each.synchronous for each in measured),
            stall_seconds=median(each.stall for each in measured),
            waited_seconds=median(each.wait for each in measured),
            stall_ratio=median(ratios),
            worst_stall_ratio=max(ratios),
            told_seconds=median(written.stall_seconds for written in self._written[2::2]),
            background_seconds=median(each.background for each in measured),
            step_seconds=median(alone),
            step_seconds_beside=median(seconds for each in measured for seconds in each.steps_beside),
        )

    def _round(self) -> _Round:
        """Save once synchronously and once in the background."""
        synchronous = self._save_and_wait()
        self._step()
        start, saved_step = time.perf_counter(), self._steps
        self._trainer.save_soon(saved_step)
        begin = time.perf_counter() - start
        seconds, wait = self._step()
        steps_beside = [seconds]
        while self._checkpoints.is_writing:
            steps_beside.append(self._step()[0])
        background = time.perf_counter() - start
        self._trainer.save_and_wait(saved_step)  # already saved: only emits its event
        return _Round(synchronous, begin, wait, background, steps_beside)

    def _save_and_wait(self) -> float:
        start = time.perf_counter()
        self._trainer.save_and_wait(self._steps)
        return time.perf_counter() - start

    def _step(self) -> tuple[float, float]:
        """Take a step and wait for the device; its seconds, and those for which a checkpoint's copy blocked it."""
        start, timer = time.perf_counter(), PhaseTimer(self._device)
        pending = self._trainer.train_step(self._steps, self._batch, timer, waited=0.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        pending.seconds = time.perf_counter() - start
        self._steps += 1
        return pending.seconds, timer.seconds()["checkpoint"]

    def _on_event(self, event: Event) -> None:
        if isinstance(event, CheckpointWritten):
            self._written.append(event)

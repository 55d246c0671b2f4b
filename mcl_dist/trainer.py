"""The pre-training loop, and what a run is made of."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.checkpoint import Checkpoints
from mcl_dist.config import choice, number
from mcl_dist.encoder import normalise
from mcl_dist.engine import Engine
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.learner import Learner
from mcl_dist.listeners import CheckpointWritten, Finished, Listener, StepDone, tell
from mcl_dist.objective import ObjectiveConfig
from mcl_dist.ranks import Ranks
from mcl_dist.schedule import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """Size and length of a run.

    Attributes:
        global_batch: videos a step, over all ranks.
        epochs: length of the run in passes over the set.
        steps: length in steps instead; wins over `epochs`.
        precision: of the encoders' forward and backward; losses and cosines are always float32.
    """

    global_batch: int = number(32, minimum=1)
    epochs: int = number(400, minimum=1)
    steps: int | None = number(None, minimum=1)
    precision: str = choice("float32", "bfloat16")

    def batch_per_rank(self, num_ranks: int) -> int:
        """Videos a step on one rank.

        Raises:
            ConfigError: when the ranks do not divide the global batch.
        """
        if self.global_batch % num_ranks:
            raise ConfigError(
                f"train.global_batch: {self.global_batch} is not divisible by {num_ranks} ranks; "
                f"set it to a multiple of {num_ranks}"
            )
        return self.global_batch // num_ranks


@dataclass
class Trainer:
    """A run, put together: parts that step, data that feeds them, and who hears of it.

    Attributes:
        batches: endless, starting with the batch of step `start`.
        start: steps done before.
    """

    engine: Engine
    learner: Learner
    ranks: Ranks
    schedule: Schedule
    losses: ObjectiveConfig
    checkpoints: Checkpoints
    checkpoint_every: int
    config: dict[str, Any]
    batches: Iterator[TubeletBatch]
    listeners: Sequence[Listener] = ()
    start: int = 0

    def fit(self) -> None:
        """Take all steps that remain, writing checkpoints on the way and at the end.

        Raises:
            UserError: when a loss is not finite, or a checkpoint cannot be written.
        """
        total = self.schedule.total_steps
        for step in range(self.start, total):
            started = time.perf_counter()
            batch = next(self.batches)
            waited = time.perf_counter() - started
            report = self._step(step, batch, waited)
            tell(self.listeners, self._done(step, report, len(batch.order), time.perf_counter() - started))
            if (step + 1) % self.checkpoint_every == 0 or step + 1 == total:
                self._save(step + 1)
        tell(self.listeners, Finished(total, _peak_bytes(self.ranks.device)))

    def _step(self, step: int, batch: TubeletBatch, waited: float) -> dict[str, float]:
        """One update; returns means over ranks of the losses and of the seconds waited."""
        keys = self.learner.momentum.encode(batch.views, step)
        weights = self.schedule.loss_weights(step, self.losses)
        clips = normalise(batch.views[:, QUERY])
        loss = self.engine.forward(clips, keys, self.learner.queue, batch.motion, batch.order, weights)
        report = self._report(step, batch, waited)
        self.engine.step(loss, self.schedule.learning_rate(step))
        self.learner.momentum.update(self.learner.network.parameters(), self.schedule.momentum(step, self.losses))
        self.learner.queue.enqueue(keys.inter_all)
        return report

    def _report(self, step: int, batch: TubeletBatch, waited: float) -> dict[str, float]:
        values = {**self.engine.objective.report, "waited": torch.tensor(waited, device=self.ranks.device)}
        means = self.ranks.mean(torch.stack([value.float() for value in values.values()]))
        report: dict[str, float] = dict(zip(values, means.tolist(), strict=True))
        if not math.isfinite(report["loss"]):
            raise UserError(
                f"step {step + 1}: the loss is {report['loss']}, this rank's videos were {batch.samples.tolist()}; "
                "lower optimizer.learning_rate and start again, it resumes from the last checkpoint"
            )
        return report

    def _done(self, step: int, report: dict[str, float], batch_per_rank: int, seconds: float) -> StepDone:
        waited = report.pop("waited")
        return StepDone(
            step=step + 1,
            epoch=step // self.schedule.steps_per_epoch,
            total_steps=self.schedule.total_steps,
            losses=report,
            learning_rate=self.schedule.learning_rate(step),
            videos=batch_per_rank * self.ranks.count,
            seconds=seconds,
            data_wait_ratio=min(1.0, waited / seconds),
        )

    def _save(self, step: int) -> None:
        snapshot = self.learner.snapshot(step, self.engine.optimizer_state(), self.config)
        url, seconds = self.checkpoints.save(snapshot)
        tell(self.listeners, CheckpointWritten(step, url, seconds))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The steps of a classifier's training, and what they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.batch import LabelledBatch
from mcl_dist.checkpoint import CheckpointShard, Progress, Snapshot, Tensors, restore
from mcl_dist.checkpoint.reader import misfit
from mcl_dist.distributed.process_group import ProcessGroup, sent_to
from mcl_dist.evaluation.classifier import ClassifierLoss, LinearLayer, draw_kept
from mcl_dist.training.anomalies import NonFiniteAttribution
from mcl_dist.training.async_scalars import AsyncScalars
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_state import Statistics, detached
from mcl_dist.training.trainer import PendingStep, Trainer

SIDE = "query"  # under which checkpoints have the statistics of a network that has no key side


@dataclass(frozen=True)
class ClassifierState:
    """The classifier alone: there are no keys."""

    network: LinearLayer

    def share(
        self, step: int, optimizer: Tensors, config: dict[str, Any], progress: Progress, schedule: dict[str, Any]
    ) -> CheckpointShard:
        """This rank's share of a checkpoint, nothing copied; `optimizer` is its share of the optimizer's state."""
        return CheckpointShard(
            step=step,
            network=detached(self.network.named_parameters()),
            optimizer=optimizer,
            statistics=detached((f"{SIDE}.{name}", buffer) for name, buffer in self.network.named_buffers()),
            progress=progress,
            schedule=schedule,
            config=config,
        )

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Take over a snapshot; `UserError`, with `where` as its name, when it is of another architecture."""
        restore(self.network, snapshot.network, snapshot.statistics, SIDE, where)

    def misfit(self, snapshot: Snapshot) -> str | None:
        """The first tensor of a snapshot that is of another architecture, in words; None when all fit."""
        return misfit(self.network, snapshot.network, snapshot.statistics, SIDE)

    def statistics(self) -> Statistics:
        """BatchNorm statistics as they are now."""
        return Statistics(list(self.network.buffers()))

    @torch.no_grad()
    def share_statistics(self, group: ProcessGroup) -> None:
        """Give all ranks the mean of theirs; all ranks must call it together."""
        for buffer in self.network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(group.mean(buffer))


@dataclass(kw_only=True)
class ClassifierTrainer(Trainer[LabelledBatch]):
    """A classifier's training.

    Attributes:
        objective: what the engine steps.
        prepare: clips as bytes (B, T, H, W, 3) to what the network takes.
        num_features: that dropout may leave out.
        dropout: share of them that it does; 0 for none.
        seed: of its draws.
    """

    learner: ClassifierState
    objective: ClassifierLoss
    prepare: Callable[[torch.Tensor], torch.Tensor]
    num_features: int
    dropout: float
    seed: int

    def take(self, step: int, batch: LabelledBatch, clock: PhaseTimer, waited: float) -> PendingStep:
        """One step, all of it in the device's hands on return; `waited` are the seconds that its batch took to come."""
        statistics = self.learner.statistics()
        clock.mark("other")
        reports = self._backward(step, batch, clock)
        report = self._mean(reports, waited)
        clock.mark("other")
        self.checkpoints.await_copy()  # of what the update changes
        clock.mark("checkpoint")
        update = self.engine.step(report["loss"], self.schedule.learning_rate(step))
        statistics.put_back_unless(update.taken)
        clock.mark("update")
        self._settle()
        clock.mark("other")
        self._pending = PendingStep(
            step=step,
            numbers=AsyncScalars({**report, **update._asdict()}),
            suspects=NonFiniteAttribution(batch, torch.stack([report["loss"] for report in reports])),
            videos=len(batch.labels) * self.group.size,
            clock=clock,
        )
        return self._pending

    def _backward(self, step: int, batch: LabelledBatch, clock: PhaseTimer) -> list[dict[str, torch.Tensor]]:
        """Forward and backward of every part of the batch; the loss's report of each."""
        kept = self._kept(step, len(batch.labels))
        reports = []
        for own in self._parts(len(batch.labels)):
            inputs = self.prepare(batch.views[own, 0])
            loss = self.engine.forward(inputs, batch.labels[own], None if kept is None else kept[own])
            clock.mark("forward")
            self.engine.backward(loss)
            clock.mark("backward")
            reports.append(self.objective.report)
        return reports

    def _kept(self, step: int, num_videos: int) -> torch.Tensor | None:
        """This rank's rows of what dropout keeps of the global batch."""
        if not self.dropout:
            return None
        everyone = draw_kept(num_videos * self.group.size, self.num_features, self.dropout, seed=self.seed, step=step)
        first = num_videos * self.group.rank
        return sent_to(self.group.device, everyone[first : first + num_videos])

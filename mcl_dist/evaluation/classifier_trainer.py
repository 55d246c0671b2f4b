"""Training of a classifier."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.batch import LabelledBatch
from mcl_dist.checkpoint import CheckpointShard, Progress, Snapshot, Tensors, restore
from mcl_dist.checkpoint.reader import first_mismatch
from mcl_dist.distributed.process_group import ProcessGroup, copy_to_device
from mcl_dist.evaluation.classifier import ClassifierLoss, LinearLayer, dropout_mask
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.trainer import Trainer
from mcl_dist.training.training_state import BufferBackup, detached

SIDE = "query"  # side of the statistics in checkpoints; a classifier has no key side


@dataclass(frozen=True)
class ClassifierState:
    """State of a classifier; a `TrainingState`."""

    network: LinearLayer

    def shard(
        self, step: int, optimizer: Tensors, config: dict[str, Any], progress: Progress, schedule: dict[str, Any]
    ) -> CheckpointShard:
        """This rank's shard of a checkpoint, without copies; `optimizer` is its shard of the optimizer state."""
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
        """Load a snapshot; `UserError`, naming it by `where`, if it has another architecture."""
        restore(self.network, snapshot.network, snapshot.statistics, SIDE, where)

    def first_mismatch(self, snapshot: Snapshot) -> str | None:
        """Description of the snapshot's first tensor of another architecture; None when all match."""
        return first_mismatch(self.network, snapshot.network, snapshot.statistics, SIDE)

    def back_up_statistics(self) -> BufferBackup:
        """Copy the BatchNorm statistics."""
        return BufferBackup(list(self.network.buffers()))

    @torch.no_grad()
    def average_statistics(self, group: ProcessGroup) -> None:
        """Set the BatchNorm statistics of all ranks to their mean; all ranks must call it together."""
        for buffer in self.network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(group.mean(buffer))


@dataclass(kw_only=True)
class ClassifierTrainer(Trainer[LabelledBatch]):
    """Training of a classifier.

    Attributes:
        objective: the module that the engine optimises.
        prepare: uint8 clips (B, T, H, W, 3) to the network's inputs.
        num_features: number of features that dropout applies to.
        dropout: share of them that are dropped; 0 for no dropout.
        seed: of the dropout masks.
    """

    state: ClassifierState
    objective: ClassifierLoss
    prepare: Callable[[torch.Tensor], torch.Tensor]
    num_features: int
    dropout: float
    seed: int

    def objective_inputs(
        self,
        step: int,
        batch: LabelledBatch,
        timer: PhaseTimer,  # noqa: ARG002
    ) -> Iterator[tuple[Any, ...]]:
        """Yield `ClassifierLoss.forward`'s inputs part by part."""
        mask = self._dropout_mask(step, len(batch.labels))
        for part in self.parts(len(batch.labels)):
            yield self.prepare(batch.views[part, 0]), batch.labels[part], None if mask is None else mask[part]

    def _dropout_mask(self, step: int, num_videos: int) -> torch.Tensor | None:
        """This rank's rows of the global batch's dropout mask."""
        if not self.dropout:
            return None
        rows = dropout_mask(num_videos * self.group.size, self.num_features, self.dropout, seed=self.seed, step=step)
        first = num_videos * self.group.rank
        return copy_to_device(self.group.device, rows[first : first + num_videos])

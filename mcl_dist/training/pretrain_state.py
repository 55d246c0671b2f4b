"""State that pre-training changes: query network, momentum encoder and negative queue."""

from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.checkpoint import CheckpointShard, Progress, Snapshot, Tensors, restore
from mcl_dist.checkpoint.reader import first_mismatch
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder
from mcl_dist.model.network import Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.training.training_state import BufferBackup, detached, flatten


@dataclass(frozen=True)
class PretrainState:
    """Query side, key side and negatives of one rank; a `TrainingState`."""

    network: Network
    momentum: MomentumEncoder
    queue: NegativeQueue

    def shard(
        self,
        step: int,
        optimizer: Tensors,
        config: dict[str, Any],
        progress: Progress | None = None,
        schedule: dict[str, Any] | None = None,
    ) -> CheckpointShard:
        """This rank's shard of a checkpoint, without copies; `optimizer` is its shard of the optimizer state."""
        sides = {"query": self.network, "key": self.momentum.network}
        return CheckpointShard(
            step=step,
            network=detached(self.network.named_parameters()),
            momentum=detached(self.momentum.network.named_parameters()),
            optimizer=optimizer,
            queue=self.queue.shard(),
            queue_position=self.queue.position,
            statistics=detached(
                (f"{side}.{name}", buffer) for side, module in sides.items() for name, buffer in module.named_buffers()
            ),
            progress=progress or Progress(),
            schedule=schedule or {},
            config=config,
        )

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Load a snapshot; `UserError`, naming it by `where`, if it has another architecture."""
        if snapshot.queue.shape != (self.queue.size, self.queue.vectors.shape[1]):
            stored, own = list(snapshot.queue.shape), [self.queue.size, self.queue.vectors.shape[1]]
            raise UserError(
                f"{where}: its queue has shape {stored}, this run's has {own}; set objective.queue and heads.dim"
            )
        restore(self.network, snapshot.network, snapshot.statistics, "query", where)
        restore(self.momentum.network, snapshot.momentum, snapshot.statistics, "key", where)
        self.queue.load(snapshot.queue, snapshot.queue_position)

    def first_mismatch(self, snapshot: Snapshot) -> str | None:
        """Description of the snapshot's first tensor of another architecture; None when all match."""
        return first_mismatch(self.network, snapshot.network, snapshot.statistics, "query") or first_mismatch(
            self.momentum.network, snapshot.momentum, snapshot.statistics, "key"
        )

    def compile(self) -> None:
        """Compile both encoders with torch.compile when they are first called."""
        self.network.encoder.compile()
        self.momentum.network.encoder.compile()

    @torch.no_grad()
    def frozen_encoder(self, group: ProcessGroup) -> Encoder:
        """A copy of the query encoder in evaluation mode, equal to one loaded from a checkpoint taken now.

        Its BatchNorm statistics are the mean over ranks: all ranks must call this together, with gathered parameters.
        No random generator advances.
        """
        source = self.network.encoder
        with torch.device("meta"):  # without values, so that none are drawn at random
            copy = Encoder(source.config)
        copy.to_empty(device=next(source.parameters()).device)
        state = source.state_dict()
        floats = {name: value for name, value in source.named_buffers() if value.is_floating_point()}
        means = group.gather(flatten(list(floats.values()))[None]).mean(dim=0)
        pieces = torch.split(means, [value.numel() for value in floats.values()])
        state |= {name: piece.view_as(value) for (name, value), piece in zip(floats.items(), pieces, strict=True)}
        copy.load_state_dict(state)
        return copy.requires_grad_(False).eval()

    def back_up_statistics(self) -> BufferBackup:
        """Copy the BatchNorm statistics of both sides."""
        return BufferBackup([*self.network.buffers(), *self.momentum.network.buffers()])

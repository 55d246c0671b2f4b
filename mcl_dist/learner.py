"""What learning changes: query network, momentum encoder and queue, and their way into and out of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.checkpoint import Snapshot, Tensors, restore
from mcl_dist.heads import Network
from mcl_dist.momentum import MomentumEncoder
from mcl_dist.negatives import Queue


@dataclass(frozen=True)
class Learner:
    """Query side, key side and negatives of one rank."""

    network: Network
    momentum: MomentumEncoder
    queue: Queue

    def snapshot(self, step: int, optimizer: Tensors, config: dict[str, Any]) -> Snapshot:
        """A copy on the CPU of all this rank holds and of the whole queue; all ranks must call it together."""
        sides = {"query": self.network, "key": self.momentum.network}
        return Snapshot(
            step=step,
            network=_copied(self.network.named_parameters()),
            momentum=_copied(self.momentum.network.named_parameters()),
            optimizer=optimizer,
            queue=self.queue.all_vectors(),
            queue_position=self.queue.position,
            statistics=_copied(
                (f"{side}.{name}", buffer) for side, module in sides.items() for name, buffer in module.named_buffers()
            ),
            config=config,
        )

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Take over a snapshot; `where` names it in errors.

        Raises:
            UserError: when it is of another architecture.
        """
        restore(self.network, snapshot.network, snapshot.statistics, "query", where)
        restore(self.momentum.network, snapshot.momentum, snapshot.statistics, "key", where)
        self.queue.load(snapshot.queue, snapshot.queue_position)


def _copied(named: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    return {name: value.detach().cpu().clone() for name, value in named}

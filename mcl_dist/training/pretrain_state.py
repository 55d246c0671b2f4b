"""What learning changes: query network, momentum encoder and queue, and their way into and out of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mcl_dist.checkpoint import CheckpointShard, Progress, Snapshot, Tensors, restore
from mcl_dist.checkpoint.reader import misfit
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder
from mcl_dist.model.network import Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue


@dataclass(frozen=True)
class PretrainState:
    """Query side, key side and negatives of one rank."""

    network: Network
    momentum: MomentumEncoder
    queue: NegativeQueue

    def share(
        self,
        step: int,
        optimizer: Tensors,
        config: dict[str, Any],
        progress: Progress | None = None,
        schedule: dict[str, Any] | None = None,
    ) -> CheckpointShard:
        """This rank's share of a checkpoint, nothing copied; `optimizer` is its share of the optimizer's state."""
        sides = {"query": self.network, "key": self.momentum.network}
        return CheckpointShard(
            step=step,
            network=detached(self.network.named_parameters()),
            momentum=detached(self.momentum.network.named_parameters()),
            optimizer=optimizer,
            queue=self.queue.share(),
            queue_position=self.queue.position,
            statistics=detached(
                (f"{side}.{name}", buffer) for side, module in sides.items() for name, buffer in module.named_buffers()
            ),
            progress=progress or Progress(),
            schedule=schedule or {},
            config=config,
        )

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Take over a snapshot; `where` names it in errors.

        Raises:
            UserError: when it is of another architecture.
        """
        if snapshot.queue.shape != (self.queue.size, self.queue.vectors.shape[1]):
            stored, own = list(snapshot.queue.shape), [self.queue.size, self.queue.vectors.shape[1]]
            raise UserError(
                f"{where}: holds negatives of shape {stored}, here {own}; set objective.queue and heads.dim"
            )
        restore(self.network, snapshot.network, snapshot.statistics, "query", where)
        restore(self.momentum.network, snapshot.momentum, snapshot.statistics, "key", where)
        self.queue.load(snapshot.queue, snapshot.queue_position)

    def misfit(self, snapshot: Snapshot) -> str | None:
        """The first tensor that is not of this learner's architecture, in words; None when all are."""
        return misfit(self.network, snapshot.network, snapshot.statistics, "query") or misfit(
            self.momentum.network, snapshot.momentum, snapshot.statistics, "key"
        )

    def compile(self) -> None:
        """Let torch.compile have both encoders, when they are first called."""
        self.network.encoder.compile()
        self.momentum.network.encoder.compile()

    @torch.no_grad()
    def frozen_encoder(self, group: ProcessGroup) -> Encoder:
        """The query encoder as it comes out of a checkpoint of this moment: a copy, in evaluation mode.

        Its BatchNorm statistics are the mean over ranks, which all must ask together, with the parameters whole. No
        generator moves.
        """
        source = self.network.encoder
        with torch.device("meta"):  # without values, so that none are drawn
            copy = Encoder(source.config)
        copy.to_empty(device=next(source.parameters()).device)
        state = source.state_dict()
        floats = {name: value for name, value in source.named_buffers() if value.is_floating_point()}
        means = group.gather(_flat(list(floats.values()))[None]).mean(dim=0)
        pieces = torch.split(means, [value.numel() for value in floats.values()])
        state |= {name: piece.view_as(value) for (name, value), piece in zip(floats.items(), pieces, strict=True)}
        copy.load_state_dict(state)
        return copy.requires_grad_(False).eval()

    def statistics(self) -> Statistics:
        """BatchNorm statistics of both sides as they are now."""
        return Statistics([*self.network.buffers(), *self.momentum.network.buffers()])


class Statistics:
    """A copy of buffers, to be put back where a step is not taken: a NaN in a running mean would stay for good."""

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        dtypes = {buffer.dtype for buffer in buffers}
        self._groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self._before = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def put_back_unless(self, taken: torch.Tensor) -> None:
        """Put the copy back where `taken`, a scalar on the device, is 0; no rank waits for it."""
        for group, before in zip(self._groups, self._before, strict=True):
            chosen = torch.where(taken > 0, _flat(group), before)
            pieces = torch.split(chosen, [buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [piece.view_as(buffer) for piece, buffer in zip(pieces, group, strict=True)])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def detached(named: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    """Named tensors without their history, not copied."""
    return {name: value.detach() for name, value in named}

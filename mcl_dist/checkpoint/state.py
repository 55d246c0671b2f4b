"""What a checkpoint holds, as a rank gives it and as it comes back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mcl_dist.checkpoint.format import (
    FORMAT,
    MOMENTUM,
    NETWORK,
    optimizer_file,
    queue_file,
    statistics_file,
)
from mcl_dist.config import number

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """What the trainer remembers of the steps so far.

    Attributes:
        recent_losses: by which the next one is judged.
        loss_is_high: whether the last one was a leap, or followed one.
        skipped_in_a_row: steps that were not finite, up to the last one.
        num_taken: steps that were finite, and so changed something.
    """

    recent_losses: tuple[float, ...] = ()
    loss_is_high: bool = False
    skipped_in_a_row: int = number(0, minimum=0)
    num_taken: int = number(0, minimum=0)


@dataclass
class CheckpointShard:
    """What one rank gives to a checkpoint; tensors are the run's own, on whatever device, not copies.

    Attributes:
        step: steps done.
        network, momentum: parameters by name, whole and the same on every rank.
        optimizer: this rank's part, as `Engine.optimizer_share` says.
        queue: this rank's part (k, d); the parts of all ranks, one after another, are the negatives.
        queue_position: where the next key goes.
        statistics: BatchNorm buffers of this rank, `query.` and `key.` before their names.
        progress, schedule, config: of the run, the same on every rank.
    """

    step: int
    network: Tensors
    momentum: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    queue: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    queue_position: int = 0
    statistics: Tensors = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    schedule: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def files(self, rank: int, num_ranks: int) -> dict[str, Tensors]:
        """The tensors that this rank writes, by file; what all ranks have is written by the first two."""
        files = {
            optimizer_file(rank): self.optimizer,
            queue_file(rank): {"queue": self.queue},
            statistics_file(rank): self.statistics,
        }
        if rank == 0:
            files[NETWORK] = self.network
        if rank == min(1, num_ranks - 1):
            files[MOMENTUM] = self.momentum
        return files

    def state(self, num_ranks: int) -> bytes:
        """What is no tensor, as the bytes of `state.json`."""
        state = {
            "format": FORMAT,
            "step": self.step,
            "queue_position": self.queue_position,
            "ranks": num_ranks,
            "progress": asdict(self.progress),
            "schedule": self.schedule,
            "config": self.config,
        }
        return json.dumps(state, indent=1).encode()


@dataclass
class Snapshot:
    """All that a run needs to go on as if it had not stopped, on the CPU.

    Attributes:
        step: steps done.
        network, momentum: parameters by name.
        optimizer: full state by `key/name`.
        queue: (K, d), and where the next key goes.
        statistics: BatchNorm buffers of one rank, or their means; `query.` and `key.` before their names.
        progress, schedule, config: of the run that was saved.
    """

    step: int
    network: Tensors
    momentum: Tensors
    optimizer: Tensors
    queue: torch.Tensor
    queue_position: int
    statistics: Tensors
    progress: Progress = field(default_factory=Progress)
    schedule: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

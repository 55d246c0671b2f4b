"""Contents of a checkpoint: the shard that one rank saves, and the snapshot that is loaded."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mcl_dist.checkpoint.format import FORMAT, MOMENTUM, NETWORK, optimizer_file, queue_file, statistics_file
from mcl_dist.config import number

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """The trainer's memory of earlier steps.

    Attributes:
        recent_losses: the window that the spike detector compares the next loss with.
        loss_is_high: whether the last loss was a spike or part of one.
        skipped_in_a_row: consecutive non-finite steps up to the last step.
        num_taken: finite steps, which updated the parameters.
    """

    recent_losses: tuple[float, ...] = ()
    loss_is_high: bool = False
    skipped_in_a_row: int = number(0, minimum=0)
    num_taken: int = number(0, minimum=0)


@dataclass
class CheckpointShard:
    """What one rank saves; tensors are the run's own on any device, not copies.

    Attributes:
        step: steps done.
        network, momentum: parameters by name, complete and equal on every rank.
        optimizer: this rank's shard, as `Engine.optimizer_shard` returns it.
        queue: this rank's shard (k, d); the shards concatenated in rank order are all negatives.
        queue_position: row of the next key.
        statistics: this rank's BatchNorm buffers, names prefixed with `query.` or `key.`.
        progress, schedule, config: of the run, equal on every rank.
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
        """The tensors that this rank writes, by file; ranks 0 and 1 write the tensors that all ranks share."""
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
        """The bytes of `state.json`, which holds everything except tensors."""
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
    """The complete state of a run at one step, on the CPU; a run resumed from it continues exactly.

    Attributes:
        step: steps done.
        network, momentum: parameters by name.
        optimizer: complete state by `key/name`.
        queue: all negatives (K, d).
        queue_position: row of the next key.
        statistics: BatchNorm buffers of one rank, or means over ranks; names prefixed with `query.` or `key.`.
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

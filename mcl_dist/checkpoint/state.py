"""Contents of a checkpoint: the shard that one rank saves, and the snapshot that is loaded."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mcl_dist.checkpoint.format import FORMAT, MOMENTUM, NETWORK, rank_file
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
class CheckpointContents:
    """What a shard and a snapshot have in common.

    Attributes:
        step: steps done.
        network, momentum: parameters by name, complete and equal on every rank.
        queue_position: row of the next key.
        statistics: BatchNorm buffers, names prefixed with `query.` or `key.`.
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


@dataclass
class Snapshot(CheckpointContents):
    """The complete state of a run at one step, on the CPU; a run resumed from it continues exactly.

    `optimizer` is by `key/name`, `queue` has all negatives (K, d), `statistics` are of one rank or means over ranks.
    """


@dataclass
class CheckpointShard(CheckpointContents):
    """What one rank saves; tensors are the run's own on any device, not copies.

    `optimizer` is as `Engine.optimizer_shard` returns it, `queue` is this rank's shard (k, d): in rank order they are
    all negatives.
    """

    def files(self, rank: int, num_ranks: int) -> dict[str, Tensors]:
        """The tensors that this rank writes, by file; ranks 0 and 1 write the tensors that all ranks share."""
        files = {
            rank_file("optimizer", rank): self.optimizer,
            rank_file("queue", rank): {"queue": self.queue},
            rank_file("statistics", rank): self.statistics,
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

"""State that training steps change: the interface to checkpoints, and the backup that undoes a skipped step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from mcl_dist.checkpoint import CheckpointShard, Progress, Snapshot, Tensors


class TrainingState(Protocol):
    """Model state of a run, without the optimizer's."""

    def shard(
        self, step: int, optimizer: Tensors, config: dict[str, Any], progress: Progress, schedule: dict[str, Any]
    ) -> CheckpointShard:
        """This rank's shard of a checkpoint, without copies; `optimizer` is its shard of the optimizer state."""

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Load a snapshot; `UserError`, naming it by `where`, if it has another architecture."""

    def first_mismatch(self, snapshot: Snapshot) -> str | None:
        """Description of the snapshot's first tensor of another architecture; None when all match."""

    def back_up_statistics(self) -> BufferBackup:
        """Copy the BatchNorm statistics."""


class BufferBackup:
    """Copy of buffers, restored when a step is skipped: a NaN would stay in a running mean forever."""

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        dtypes = {buffer.dtype for buffer in buffers}
        self._groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self._copies = [flatten(group) for group in self._groups]

    @torch.no_grad()
    def restore_unless(self, taken: torch.Tensor) -> None:
        """Restore the copy where `taken`, a scalar on the device, is 0; the host does not wait for it."""
        for group, copy in zip(self._groups, self._copies, strict=True):
            values = torch.where(taken > 0, flatten(group), copy)
            pieces = torch.split(values, [buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [piece.view_as(buffer) for piece, buffer in zip(pieces, group, strict=True)])


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values of the tensors, (N,)."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def detached(named: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    """Named tensors, detached and not copied."""
    return {name: value.detach() for name, value in named}

"""Batches: the data that a loader passes to the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

NUM_VIEWS = 4
QUERY, FIRST_KEY, SECOND_KEY, THIRD_KEY = range(NUM_VIEWS)

Self = TypeVar("Self", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: B videos with V views each.

    Attributes:
        views: uint8 (B, V, T, H, W, 3), RGB, cropped, resized, colour-jittered, blurred and mirrored.
        samples: int64 (B,), position of each video in the shard set.
        boxes: float32 (B, V, 4), each view's crop of the stored frames: top, left, height, width in pixels, which may
            be fractional.
    """

    views: torch.Tensor
    samples: torch.Tensor
    boxes: torch.Tensor

    def to(self: Self, device: torch.device) -> Self:
        """The batch on a device; the host does not wait for a copy from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self: Self) -> Self:
        """The batch in pinned host memory, from which a GPU copies asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self: Self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return type(self)(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class TubeletBatch(Batch):
    """Four views per video: query, first, second and third key (METHOD.md, section 2).

    Attributes:
        motion: float32 (B, T', H', W'), the query's motion target, on the grid of the feature map.
        order: int64 (B,), 1 where the first clip comes from the first half of its video.
    """

    motion: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """One view per video, and its class (METHOD.md, section 6).

    Attributes:
        labels: int64 (B,), each video's class in the set.
    """

    labels: torch.Tensor

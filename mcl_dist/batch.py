"""What the data side hands to the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

NUM_VIEWS = 4
QUERY, FIRST_KEY, SECOND_KEY, THIRD_KEY = range(NUM_VIEWS)

Self = TypeVar("Self", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: B videos, V views each.

    Attributes:
        views: uint8 (B, V, T, H, W, 3), RGB, already cropped, resized, colour-jittered, blurred and mirrored.
        samples: int64 (B,), position of each video in the shard set.
        boxes: float32 (B, V, 4), what each view shows of the stored frames: top, left, height, width in their pixels,
            perhaps fractions of them.
    """

    views: torch.Tensor
    samples: torch.Tensor
    boxes: torch.Tensor

    def to(self: Self, device: torch.device) -> Self:
        """The batch on a device; from pinned memory the copy does not keep the host waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self: Self) -> Self:
        """The batch in host memory that a GPU reads by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self: Self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return type(self)(**{name: change(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class TubeletBatch(Batch):
    """Four views a video: query, first, second and third key (METHOD.md, section 2).

    Attributes:
        motion: float32 (B, T', H', W'), the query's motion target, on the grid of the feature map.
        order: int64 (B,), 1 where the first clip comes from the first half of its video.
    """

    motion: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """One view a video, and what it shows (METHOD.md, section 6).

    Attributes:
        labels: int64 (B,), the set's class of each video.
    """

    labels: torch.Tensor

"""What the data side hands to the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

NUM_VIEWS = 4
QUERY, FIRST_KEY, SECOND_KEY, THIRD_KEY = range(NUM_VIEWS)


@dataclass(frozen=True)
class TubeletBatch:
    """One rank's share of a global batch: B videos, four views each (METHOD.md, section 2).

    Attributes:
        views: uint8 (B, 4, T, H, W, 3), RGB; query, first, second and third key, already cropped,
            resized, colour-jittered, blurred and mirrored.
        motion: float32 (B, T', H', W'), the query's motion target, on the grid of the feature map.
        order: int64 (B,), 1 where the first clip comes from the first half of its video.
        samples: int64 (B,), position of each video in the shard set.
        boxes: float32 (B, 4, 4), what each view shows of the stored frames: top, left, height, width in their pixels,
            perhaps fractions of them.
    """

    views: torch.Tensor
    motion: torch.Tensor
    order: torch.Tensor
    samples: torch.Tensor
    boxes: torch.Tensor

    def to(self, device: torch.device) -> TubeletBatch:
        """The batch on a device; from pinned memory the copy does not keep the host waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TubeletBatch:
        """The batch in host memory that a GPU reads by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TubeletBatch:
        return TubeletBatch(**{name: change(tensor) for name, tensor in vars(self).items()})

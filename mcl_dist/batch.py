"""What the data side hands to the method."""

from __future__ import annotations

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
    """

    views: torch.Tensor
    motion: torch.Tensor
    order: torch.Tensor
    samples: torch.Tensor

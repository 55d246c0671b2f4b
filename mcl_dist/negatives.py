"""The queue of past keys that serve as negatives (METHOD.md, section 4)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


class Queue:
    """K unit vectors in a ring, the oldest overwritten first; every rank holds the same.

    Attributes:
        vectors: float (K, d).
        position: where the next key is written.
    """

    def __init__(self, vectors: torch.Tensor, position: int = 0) -> None:
        self.vectors = vectors
        self.position = position

    @classmethod
    def random(cls, size: int, dim: int, generator: torch.Generator, device: torch.device) -> Queue:
        """A queue of random directions, float32, the same for equal generators."""
        return cls(normalize(torch.randn(size, dim, generator=generator), dim=1).to(device))

    def similarities(self, queries: torch.Tensor) -> torch.Tensor:
        """Dot products of queries (B, d) with every vector: (B, K)."""
        return queries @ self.vectors.T

    def enqueue(self, keys: torch.Tensor) -> None:
        """Write the keys of all ranks (3, B·W, d): all first, all second, all third, wrapping around.

        When they outnumber the queue, the newest stay.
        """
        rows = keys.flatten(0, 1)
        size = len(self.vectors)
        places = (self.position + torch.arange(len(rows), device=rows.device)) % size
        self.vectors[places[-size:]] = rows[-size:].to(self.vectors.dtype)
        self.position = (self.position + len(rows)) % size

"""Which bytes to ask for in one request, when many small pieces of a file are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_WASTE = 0.08  # bytes between pieces that are read along, of the pieces' own


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `end`, which hold the wanted pieces of these numbers."""

    start: int
    end: int
    pieces: tuple[int, ...]


def merged(places: np.ndarray, waste: float = MOST_WASTE) -> list[ByteRange]:
    """As few ranges as read at most `waste` bytes more, in proportion, than the pieces have.

    Smallest gaps are closed first, which makes the most of what may be wasted.

    Args:
        places: int64 (pieces, 2), offset and size; in any order, with repetitions, also overlapping.
        waste: fraction of the pieces' bytes.
    """
    if not len(places):
        return []
    order = np.argsort(places[:, 0], kind="stable")
    starts = places[order, 0]
    ends = np.maximum.accumulate(starts + places[order, 1])
    gaps = starts[1:] - ends[:-1]
    wanted = int(ends[-1] - starts[0] - gaps[gaps > 0].sum())
    by_size = np.argsort(gaps, kind="stable")
    closed = np.zeros(len(gaps), bool)
    closed[by_size] = np.maximum(gaps[by_size], 0).cumsum() <= waste * wanted
    groups = np.split(np.arange(len(order)), np.flatnonzero(~closed) + 1)
    return [ByteRange(int(starts[group[0]]), int(ends[group[-1]]), tuple(order[group].tolist())) for group in groups]

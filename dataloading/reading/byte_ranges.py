"""Merging of byte ranges: many small pieces of a file become few requests."""

from dataclasses import dataclass

import numpy as np

MAX_WASTE = 0.08  # bytes read between pieces, as a fraction of the pieces' own


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `end` of a file, and the numbers of the pieces inside."""

    start: int
    end: int
    pieces: tuple[int, ...]


def merge_ranges(extents: np.ndarray, waste: float = MAX_WASTE) -> list[ByteRange]:
    """The fewest ranges that cover all pieces and read at most `waste` more bytes, in proportion, than the pieces have.

    The smallest gaps are closed first, which closes as many as the waste allows.

    Args:
        extents: int64 (pieces, 2), offset and size; in any order, may repeat and overlap.
        waste: fraction of the pieces' bytes.
    """
    if not len(extents):
        return []
    order = np.argsort(extents[:, 0], kind="stable")
    starts = extents[order, 0]
    stops = np.maximum.accumulate(starts + extents[order, 1])
    gaps = starts[1:] - stops[:-1]
    wanted = int(stops[-1] - starts[0] - gaps[gaps > 0].sum())
    by_size = np.argsort(gaps, kind="stable")
    closed = np.zeros(len(gaps), bool)
    closed[by_size] = np.maximum(gaps[by_size], 0).cumsum() <= waste * wanted
    groups = np.split(np.arange(len(order)), np.flatnonzero(~closed) + 1)
    return [ByteRange(int(starts[group[0]]), int(stops[group[-1]]), tuple(order[group].tolist())) for group in groups]

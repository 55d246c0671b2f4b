"""The median of the 5×5 pixels around each, one plane at a time on one core; memory layout as in `padded_images`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dataloading.flow.padded_images import stride
from dataloading.flow.simd import LANES, inlined, kernel, larger, load, smaller, store


def median_scratch_size(width: int) -> int:
    """Floats of the scratch space."""
    return int(5 * (stride(width) + LANES))


@kernel
def median(plane: np.ndarray, out: np.ndarray, scratch: np.ndarray, height: int, width: int) -> None:
    """Median of the 5×5 pixels around each; the border's are repeated outside.

    Columns are sorted first, once for the five medians that they are part of, then the five ranks across them. In a
    square sorted both ways the median of all is one of three: the largest before the long diagonal, the median on
    it, the smallest after it.
    """
    stride_ = stride(width)
    rank = stride_ + LANES  # from one rank's row in the scratch space to the next
    for y in range(height):
        rows = (max(y - 2, 0), max(y - 1, 0), y, min(y + 1, height - 1), min(y + 2, height - 1))
        a, b, c, d, e = [(row + 1) * stride_ + LANES for row in rows]
        for x in range(0, width, LANES):
            column = _sorted(
                load(plane, a + x), load(plane, b + x), load(plane, c + x), load(plane, d + x), load(plane, e + x)
            )
            at = LANES + x
            store(scratch, at, column[0])
            store(scratch, at + rank, column[1])
            store(scratch, at + 2 * rank, column[2])
            store(scratch, at + 3 * rank, column[3])
            store(scratch, at + 4 * rank, column[4])
        for start in range(LANES, LANES + 5 * rank, rank):
            scratch[start - 2 : start] = scratch[start]
            scratch[start + width : start + width + 2] = scratch[start + width - 1]
        for x in range(0, width, LANES):
            at = LANES + x - 2
            lowest, low = _sorted_across(scratch, at), _sorted_across(scratch, at + rank)
            middle = _sorted_across(scratch, at + 2 * rank)
            high, highest = _sorted_across(scratch, at + 3 * rank), _sorted_across(scratch, at + 4 * rank)
            before = larger(larger(lowest[3], low[2]), larger(middle[1], high[0]))
            after = smaller(smaller(low[4], middle[3]), smaller(high[2], highest[1]))
            diagonal = _sorted(lowest[4], low[3], middle[2], high[1], highest[0])[2]
            store(out, c + x, larger(smaller(before, diagonal), smaller(larger(before, diagonal), after)))


@inlined
def _sorted_across(scratch: np.ndarray, at: int) -> Any:
    return _sorted(
        load(scratch, at), load(scratch, at + 1), load(scratch, at + 2), load(scratch, at + 3), load(scratch, at + 4)
    )


@inlined
def _sorted(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    a, b = smaller(a, b), larger(a, b)
    d, e = smaller(d, e), larger(d, e)
    c, e = smaller(c, e), larger(c, e)
    c, d = smaller(c, d), larger(c, d)
    b, e = smaller(b, e), larger(b, e)
    a, d = smaller(a, d), larger(a, d)
    a, c = smaller(a, c), larger(a, c)
    b, d = smaller(b, d), larger(b, d)
    b, c = smaller(b, c), larger(b, c)
    return a, b, c, d, e

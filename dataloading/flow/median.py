"""Median filter of 5×5 pixels, for one image on one core; memory layout as in `padded_images`."""

from typing import Any

import numpy as np

from dataloading.flow.padded_images import row_stride
from dataloading.flow.simd import SIMD_WIDTH, inlined, kernel, load, maximum, minimum, store


def median_scratch_size(width: int) -> int:
    """Floats of the scratch buffer."""
    return int(5 * (row_stride(width) + SIMD_WIDTH))


@kernel
def median(image: np.ndarray, out: np.ndarray, scratch: np.ndarray, height: int, width: int) -> None:
    """Median of the 5×5 pixels around each; border pixels are repeated outside.

    Each column is sorted once, for all five medians that use it; then each rank is sorted across five columns. In a
    square sorted in both directions the median is one of three values: the largest before the long diagonal, the
    median on it, the smallest after it.
    """
    stride = row_stride(width)
    rank = stride + SIMD_WIDTH  # floats from one rank's row in the scratch buffer to the next
    for y in range(height):
        rows = (max(y - 2, 0), max(y - 1, 0), y, min(y + 1, height - 1), min(y + 2, height - 1))
        a, b, c, d, e = [(row + 1) * stride + SIMD_WIDTH for row in rows]
        for x in range(0, width, SIMD_WIDTH):
            column = _sorted(
                load(image, a + x), load(image, b + x), load(image, c + x), load(image, d + x), load(image, e + x)
            )
            at = SIMD_WIDTH + x
            store(scratch, at, column[0])
            store(scratch, at + rank, column[1])
            store(scratch, at + 2 * rank, column[2])
            store(scratch, at + 3 * rank, column[3])
            store(scratch, at + 4 * rank, column[4])
        for start in range(SIMD_WIDTH, SIMD_WIDTH + 5 * rank, rank):
            scratch[start - 2 : start] = scratch[start]
            scratch[start + width : start + width + 2] = scratch[start + width - 1]
        for x in range(0, width, SIMD_WIDTH):
            at = SIMD_WIDTH + x - 2
            lowest, low = _sorted_across(scratch, at), _sorted_across(scratch, at + rank)
            middle = _sorted_across(scratch, at + 2 * rank)
            high, highest = _sorted_across(scratch, at + 3 * rank), _sorted_across(scratch, at + 4 * rank)
            before = maximum(maximum(lowest[3], low[2]), maximum(middle[1], high[0]))
            after = minimum(minimum(low[4], middle[3]), minimum(high[2], highest[1]))
            diagonal = _sorted(lowest[4], low[3], middle[2], high[1], highest[0])[2]
            store(out, c + x, maximum(minimum(before, diagonal), minimum(maximum(before, diagonal), after)))


@inlined
def _sorted_across(scratch: np.ndarray, at: int) -> Any:
    return _sorted(
        load(scratch, at), load(scratch, at + 1), load(scratch, at + 2), load(scratch, at + 3), load(scratch, at + 4)
    )


@inlined
def _sorted(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    a, b = minimum(a, b), maximum(a, b)
    d, e = minimum(d, e), maximum(d, e)
    c, e = minimum(c, e), maximum(c, e)
    c, d = minimum(c, d), maximum(c, d)
    b, e = minimum(b, e), maximum(b, e)
    a, d = minimum(a, d), maximum(a, d)
    a, c = minimum(a, c), maximum(a, c)
    b, d = minimum(b, d), maximum(b, d)
    b, c = minimum(b, c), maximum(b, c)
    return a, b, c, d, e

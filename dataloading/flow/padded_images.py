"""How pictures lie in memory for compiled kernels.

Planes are flat, a row after the other, each row with a margin of sixteen floats before it, a row of margin above the
first and below the last. So the neighbours of a pixel are at fixed distances, and sixteen pixels are handled at once
(`dataloading.flow.simd`) without a thought for borders: what a margin holds is zero, or multiplied by zero.
"""

from __future__ import annotations

import numpy as np

from dataloading.flow.simd import LANES, kernel

CACHE_LINE = 64  # bytes


@kernel
def stride(width: int) -> int:
    """Floats from one row of a plane to the next."""
    return LANES * (-(-width // LANES)) + LANES


def plane_size(height: int, width: int) -> int:
    """Floats of a plane."""
    return int((height + 2) * stride(width) + LANES)


def inside(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """A view (N, H, W) of the pixels of planes (N, plane_size)."""
    step = stride(width)
    rows = planes[:, LANES : LANES + (height + 2) * step].reshape(len(planes), height + 2, step)
    return rows[:, 1:-1, :width]


def aligned(rows: int, floats: int) -> np.ndarray:
    """Zeros, each row of which begins a cache line: vectors that straddle two cost twice."""
    line = CACHE_LINE // 4
    floats = -(-floats // line) * line
    memory = np.zeros(rows * floats + line, dtype=np.float32)
    skip = (-memory.ctypes.data % CACHE_LINE) // 4
    return memory[skip : skip + rows * floats].reshape(rows, floats)

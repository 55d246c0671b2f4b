"""Memory layout of images for compiled kernels: rows with margins.

An image is flat, one row after the other. Each row has a margin of sixteen floats before it, and there is a row of
margin above the first and below the last. The neighbours of a pixel are therefore at fixed distances, and a vector
of sixteen pixels (`dataloading.flow.simd`) needs no special case at borders: a margin holds zeros, or values that
are multiplied by zero.
"""

import numpy as np

from dataloading.flow.simd import SIMD_WIDTH, kernel

CACHE_LINE = 64  # bytes


@kernel
def row_stride(width: int) -> int:
    """Floats from one row of an image to the next."""
    return SIMD_WIDTH * (-(-width // SIMD_WIDTH)) + SIMD_WIDTH


def padded_size(height: int, width: int) -> int:
    """Floats of an image with its margins."""
    return int((height + 2) * row_stride(width) + SIMD_WIDTH)


def interior(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """A view (N, H, W) of the pixels of images (N, padded_size)."""
    stride = row_stride(width)
    rows = images[:, SIMD_WIDTH : SIMD_WIDTH + (height + 2) * stride].reshape(len(images), height + 2, stride)
    return rows[:, 1:-1, :width]


def aligned_zeros(rows: int, floats: int) -> np.ndarray:
    """Zeros, float32, with every row at the start of a cache line: a vector across two lines costs twice."""
    line = CACHE_LINE // 4
    floats = -(-floats // line) * line
    memory = np.zeros(rows * floats + line, dtype=np.float32)
    skip = (-memory.ctypes.data % CACHE_LINE) // 4
    return memory[skip : skip + rows * floats].reshape(rows, floats)

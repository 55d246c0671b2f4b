"""NumPy arrays as bytes and back, with every size known before room is made for it."""

from __future__ import annotations

import io
import math
import re

import numpy as np

# What `numpy.save` writes of a plain array; nothing of it is evaluated.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][biuf]\d|<U\d{1,4})', 'fortran_order': False, "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n",
    re.DOTALL,
)


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """The array of an npy file's bytes, read-only; it holds numbers or text, in C order.

    Raises:
        ValueError: it is no such file, or its length is not what its header says.
    """
    header = _HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise ValueError("no npy header of a plain array")
    dtype = np.dtype(header[2].decode())
    shape = tuple(int(side) for side in header[3].split(b",") if side.strip())
    if math.prod(shape) * dtype.itemsize != len(data) - header.end():
        raise ValueError(f"{len(data)} bytes are not an array of shape {shape}")
    return np.frombuffer(data, dtype, offset=header.end()).reshape(shape)

"""Headers of the files in a shard: sizes of JPEG and NumPy data are known before either is decoded."""

import io
import math
import re

import numpy as np

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
# Frame headers of baseline, extended and progressive JPEG; no encoder that we read from writes the other kinds.
SIZE_MARKERS = (0xC0, 0xC1, 0xC2)
SCAN_MARKER = 0xDA
# The header that `numpy.save` writes for a plain array. It is matched, never evaluated.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][biuf]\d|<U\d{1,4})', 'fortran_order': False, "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n",
    re.DOTALL,
)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width from a JPEG's header; None without a valid start, header or end.

    A decoder that is given a broken still fails its whole batch and does not name the still, so each is checked first.
    """
    if not (data.startswith(JPEG_START) and data.endswith(JPEG_END)):
        return None
    at = len(JPEG_START)
    while at + 9 <= len(data) and data[at] == JPEG_START[0] and data[at + 1] != SCAN_MARKER:
        if data[at + 1] in SIZE_MARKERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """The array in an npy file's bytes: read-only numbers or text in C order.

    Raises:
        ValueError: the bytes are not such a file, or their number contradicts the header.
    """
    header = _NPY_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise ValueError("no npy header of a plain array")
    dtype = np.dtype(header[2].decode())
    shape = tuple(int(side) for side in header[3].split(b",") if side.strip())
    if math.prod(shape) * dtype.itemsize != len(data) - header.end():
        raise ValueError(f"{len(data)} bytes are not an array of shape {shape}")
    return np.frombuffer(data, dtype, offset=header.end()).reshape(shape)

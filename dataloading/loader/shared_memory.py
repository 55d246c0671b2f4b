"""Memory that processes share and that has no name: it is gone with the last process that maps it."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
# Name, type, shape and first byte of an array.
ArraySpec = tuple[str, str, list[int], int]


class SharedArrays:
    """Room for named arrays, one set of them after another; it grows as needed.

    Attributes:
        descriptor: of the memory, to be sent to another process, which makes a `SharedArrays` of it.
        places: of the arrays that were made since `clear`.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("mcl-room") if descriptor is None else descriptor
        self.places: list[ArraySpec] = []
        self._end = 0
        self._bytes = np.empty(0, dtype=np.uint8)

    def clear(self) -> None:
        """Begin anew: what is there will be written over."""
        self.places, self._end = [], 0

    def array(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """A new array of whatever was there before."""
        kind = np.dtype(dtype)
        place = (name, kind.str, list(shape), self._end)
        self.places.append(place)
        self._end += -(-int(np.prod(shape)) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
        if os.fstat(self.descriptor).st_size < self._end:
            os.ftruncate(self.descriptor, -(-self._end // _PAGE) * _PAGE)
        return _placed(self._mapped(), place)

    def put(self, name: str, values: np.ndarray) -> None:
        """A copy of an array."""
        self.array(name, values.shape, values.dtype)[...] = values

    def arrays(self, places: Sequence[ArraySpec], when_gone: Callable[[], Any]) -> dict[str, np.ndarray]:
        """Arrays that another process made; `when_gone` is called when nobody here has any of them any longer."""
        # A view of its own, which all arrays, and tensors made of them, keep alive.
        lease = np.frombuffer(self._mapped().data, dtype=np.uint8)
        weakref.finalize(lease, when_gone).atexit = False
        return {place[0]: _placed(lease, place) for place in places}

    def close(self) -> None:
        """Let the memory go, once nobody has an array of it."""
        os.close(self.descriptor)

    def _mapped(self) -> np.ndarray:
        size = os.fstat(self.descriptor).st_size
        if len(self._bytes) < size:
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, size), dtype=np.uint8)
        return self._bytes


def _placed(memory: np.ndarray, place: ArraySpec) -> np.ndarray:
    _, dtype, shape, first = place
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return memory[first : first + size].view(dtype).reshape(shape)

"""Anonymous shared memory: the kernel frees it with the last process that maps it."""

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
# Name, dtype, shape and offset in bytes of an array.
ArraySpec = tuple[str, str, list[int], int]


class SharedArrays:
    """A buffer for named arrays that grows as needed; `clear` starts the next set of arrays.

    Attributes:
        descriptor: of the memory; another process that receives it makes a `SharedArrays` from it.
        specs: of the arrays allocated since `clear`.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("mcl-arrays") if descriptor is None else descriptor
        self.specs: list[ArraySpec] = []
        self._end = 0
        self._bytes = np.empty(0, dtype=np.uint8)

    def clear(self) -> None:
        """Drop all arrays; the next ones overwrite them."""
        self.specs, self._end = [], 0

    def allocate(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """A new uninitialised array."""
        kind = np.dtype(dtype)
        spec = (name, kind.str, list(shape), self._end)
        self.specs.append(spec)
        self._end += -(-int(np.prod(shape)) * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
        if os.fstat(self.descriptor).st_size < self._end:
            os.ftruncate(self.descriptor, -(-self._end // _PAGE) * _PAGE)
        return _view(self._mapped(), spec)

    def put(self, name: str, values: np.ndarray) -> None:
        """Copy an array into the buffer."""
        self.allocate(name, values.shape, values.dtype)[...] = values

    def views(self, specs: Sequence[ArraySpec], on_release: Callable[[], Any]) -> dict[str, np.ndarray]:
        """Arrays that another process wrote; `on_release` is called when this process holds none of them any more."""
        # All arrays, and tensors made of them, keep this object alive.
        lease = np.frombuffer(self._mapped().data, dtype=np.uint8)
        weakref.finalize(lease, on_release).atexit = False
        return {spec[0]: _view(lease, spec) for spec in specs}

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last array of it."""
        os.close(self.descriptor)

    def _mapped(self) -> np.ndarray:
        size = os.fstat(self.descriptor).st_size
        if len(self._bytes) < size:
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, size), dtype=np.uint8)
        return self._bytes


def _view(memory: np.ndarray, spec: ArraySpec) -> np.ndarray:
    _, dtype, shape, offset = spec
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return memory[offset : offset + size].view(dtype).reshape(shape)

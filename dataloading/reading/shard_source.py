"""Pieces of one shard: from a file on this machine, from its copy in the cache, or fetched piece by piece."""

import os
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from dataloading.reading.fetcher import Fetcher
from dataloading.reading.file_lock import LockedFile
from dataloading.reading.read_counters import ReadCounters
from dataloading.reading.shard_cache import Fill, ShardCache
from dataloading.shards.format import ShardEntry


class ShardSource(Protocol):
    """One shard, open while this object exists."""

    def read(self, extents: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """The bytes at each (offset, size); wrong or short only where the shard itself is damaged.

        Args:
            extents: int64 (n, 2).
            crcs: uint32 (n,), the CRC-32 of each.
        """


class LocalShard:
    """A shard that is read in place; `OSError` when it does not exist."""

    def __init__(self, path: str, counters: ReadCounters) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._counters = counters

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, extents: np.ndarray, crcs: np.ndarray) -> list[bytes]:  # noqa: ARG002 (part of the protocol)
        """See `ShardSource`."""
        with self._counters.timed("read"):
            pieces = _pieces(self._descriptor, extents)
        self._counters.add("bytes_read", sum(map(len, pieces)))
        return pieces


class CachedShard:
    """A shard's copy in the cache; a damaged copy is fetched once more."""

    def __init__(self, cache: ShardCache, entry: ShardEntry, fill: Fill, counters: ReadCounters) -> None:
        self._open: Callable[[], LockedFile] = lambda: cache.open(entry.sha256, entry.bytes, fill)
        self._discard: Callable[[LockedFile], bool] = lambda file: cache.discard(entry.sha256, file)
        self._counters = counters
        with counters.timed("fetch"):
            self._file = self._open()

    def read(self, extents: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """See `ShardSource`."""
        with self._counters.timed("read"):
            pieces = _pieces(self._file.descriptor, extents)
        if [zlib.crc32(piece) for piece in pieces] == crcs.tolist() or not self._discard(self._file):
            return pieces
        self._file.close()
        with self._counters.timed("fetch"):
            self._file = self._open()
        return _pieces(self._file.descriptor, extents)


class RemoteShard:
    """A shard whose pieces are fetched each time they are read."""

    def __init__(self, fetcher: Fetcher, name: str, counters: ReadCounters) -> None:
        self._fetcher = fetcher
        self._name = name
        self._counters = counters

    def read(self, extents: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """See `ShardSource`."""
        with self._counters.timed("ranges"):
            return self._fetcher.pieces(self._name, extents, crcs)


def _pieces(descriptor: int, extents: np.ndarray) -> list[bytes]:
    return [os.pread(descriptor, size, offset) for offset, size in extents.tolist()]

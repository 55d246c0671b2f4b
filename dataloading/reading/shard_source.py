"""Pieces of a shard: of a file on this machine, of its copy in the cache, or fetched one by one."""

from __future__ import annotations

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
    """One shard, open for as long as this is held."""

    def read(self, places: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """The bytes at each (offset, size), int64 (n, 2); wrong or short ones only when they lie there so.

        Args:
            places: int64 (n, 2).
            crcs: uint32 (n,), the CRC-32 of each.
        """


class FileInPlace:
    """A shard that is read where it lies; `OSError` when it is not there."""

    def __init__(self, path: str, report: ReadCounters) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._report = report

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, places: np.ndarray, crcs: np.ndarray) -> list[bytes]:  # noqa: ARG002 (part of the protocol)
        """See `ShardSource`."""
        with self._report.timed("read"):
            pieces = _pieces(self._descriptor, places)
        self._report.add("bytes_read", sum(map(len, pieces)))
        return pieces


class CachedFile:
    """A shard's copy in the cache; one that has gone bad there is fetched once more."""

    def __init__(self, cache: ShardCache, entry: ShardEntry, fill: Fill, report: ReadCounters) -> None:
        self._open: Callable[[], LockedFile] = lambda: cache.open(entry.sha256, entry.bytes, fill)
        self._discard: Callable[[LockedFile], bool] = lambda file: cache.discard(entry.sha256, file)
        self._report = report
        with report.timed("fetch"):
            self._file = self._open()

    def read(self, places: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """See `ShardSource`."""
        with self._report.timed("read"):
            pieces = _pieces(self._file.descriptor, places)
        if [zlib.crc32(piece) for piece in pieces] == crcs.tolist() or not self._discard(self._file):
            return pieces
        self._file.close()
        with self._report.timed("fetch"):
            self._file = self._open()
        return _pieces(self._file.descriptor, places)


class FetchedRanges:
    """A shard of which each piece is fetched when it is asked for."""

    def __init__(self, fetcher: Fetcher, name: str, report: ReadCounters) -> None:
        self._fetcher = fetcher
        self._name = name
        self._report = report

    def read(self, places: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """See `ShardSource`."""
        with self._report.timed("ranges"):
            return self._fetcher.pieces(self._name, places, crcs)


def _pieces(descriptor: int, places: np.ndarray) -> list[bytes]:
    return [os.pread(descriptor, size, offset) for offset, size in places.tolist()]

"""Reading a set's files from a store that fails now and then: tried again until right, or until the time is up."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataloading.reading.byte_ranges import ByteRange, merged
from dataloading.reading.read_counters import ReadCounters
from dataloading.reading.store import RangeReader
from dataloading.reading.thread_map import ThreadMap
from mcl_dist.config import byte_size, choice, number
from mcl_dist.storage.retry import RetryPolicy, TransientError

PART_BYTES = 2**25  # of a shard, in one request
NUM_REQUESTS = 16  # of a process at a time


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How a set that is not on this machine is read.

    Attributes:
        fetch: shards `whole` into the cache, or just the `ranges` of bytes that are needed, each time.
        cache_limit: bytes that the cache's shards may take; more only while so many are being read.
        retry_seconds: how long a request is repeated before it is given up.
        request_seconds: after which a request without an answer is repeated; a second more for each MiB.
    """

    fetch: str = choice("whole", "ranges")
    cache_limit: int | None = byte_size(None)
    retry_seconds: float = number(300.0, minimum=0)
    request_seconds: float = number(30.0, minimum=0.01)


class Fetcher:
    """Files of one set; several threads may ask at once.

    All methods raise `MissingFileError` when there is no such file, and `UserError` when the store cannot be used
    or does not answer for `retry_seconds`.
    """

    def __init__(self, store: RangeReader, config: FetchConfig, report: ReadCounters) -> None:
        self.url = store.url
        self._store = store
        self._report = report
        self._patience = RetryPolicy(config.retry_seconds, config.request_seconds, failures=report.retries)
        self._requests = ThreadMap(NUM_REQUESTS, "fetch")

    def close(self) -> None:
        """Give up what is being waited for; requests under way end by themselves."""
        self._patience.ended.set()
        self._requests.close()

    def small_file(self, name: str, most: int, is_right: Callable[[bytes], bool]) -> bytes:
        """A whole file, or its first bytes when it has more than `most`.

        What is still not right, though it came the same twice, lies there so, and is returned.
        """
        return self._checked(name, 0, most, is_right, may_end=True)

    def shard(self, name: str, size: int, sha256: str, descriptor: int) -> bool:
        """Write a file's first `size` bytes to an open local file; whether they have the digest.

        What has not, though it came the same twice, is damaged where it lies; it may be shorter, too.
        """
        starts = range(0, size, PART_BYTES)
        seen: set[str] = set()
        end = size

        def part(start: int) -> int:
            nonlocal end
            if start >= end:  # the file turned out to be shorter
                return 0
            data = self._checked(name, start, min(start + PART_BYTES, size), lambda _: True)
            write_at(descriptor, data, start)
            if len(data) < min(PART_BYTES, size - start):
                end = min(end, start + len(data))
            return len(data)

        def attempt() -> bool:
            nonlocal end
            end = size
            os.ftruncate(descriptor, sum(self._requests.map(part, starts)))
            found = file_sha256(descriptor)
            if found != sha256 and found not in seen:
                seen.add(found)
                raise TransientError("wrong_digest", f"{self.url}/{name}: not the bytes that the manifest names")
            return found == sha256

        return self._patience.until_it_works(attempt)

    def pieces(self, name: str, places: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """The bytes at each (offset, size), int64 (n, 2), with each one's CRC-32, uint32 (n,).

        Near ones are asked for together. What came wrong or short the same way twice is returned so.
        """
        pieces: list[bytes] = [b""] * len(places)

        def cut(data: bytes, start: int, numbers: tuple[int, ...]) -> list[bytes]:
            return [data[offset - start : offset - start + size] for offset, size in places[list(numbers)].tolist()]

        def fetch(wanted: ByteRange) -> None:
            def is_right(data: bytes) -> bool:
                found = cut(data, wanted.start, wanted.pieces)
                return list(map(zlib.crc32, found)) == list(crcs[list(wanted.pieces)])

            data = self._checked(name, wanted.start, wanted.end, is_right)
            for place, piece in zip(wanted.pieces, cut(data, wanted.start, wanted.pieces), strict=True):
                pieces[place] = piece

        self._requests.map(fetch, merged(places))
        return pieces

    def _checked(
        self, name: str, start: int, end: int, is_right: Callable[[bytes], bool], *, may_end: bool = False
    ) -> bytes:
        seen: set[int] = set()

        def attempt() -> bytes:
            data = self._request(name, start, end, 0 if may_end else end - start)
            is_short = len(data) < end - start and not may_end
            if not is_short and is_right(data):
                return data
            if (identity := zlib.crc32(data)) not in seen:
                seen.add(identity)
                what = f"{self.url}/{name}: {len(data)} bytes from {start}"
                raise TransientError("short_body" if is_short else "wrong_digest", what)
            if is_short and self._request(name, start + len(data), end, 0):
                raise TransientError("short_body", f"{self.url}/{name}: {len(data)} bytes from {start}, and more after")
            return data

        return self._patience.until_it_works(attempt)

    def _request(self, name: str, start: int, end: int, expected: int) -> bytes:
        self._report.add("requests")
        data = self._store.read(name, start, end, self._patience.limit(expected))
        self._report.add("bytes_read", len(data))
        return data


def write_at(descriptor: int, data: bytes, start: int) -> None:
    """Write all of the data, which one call of the system need not do."""
    left = memoryview(data)
    while left:
        num_written = os.pwrite(descriptor, left, start)
        left, start = left[num_written:], start + num_written


def file_sha256(descriptor: int) -> str:
    """Hexadecimal digest of an open file."""
    digest = hashlib.sha256()
    at = 0
    while block := os.pread(descriptor, 2**20, at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()

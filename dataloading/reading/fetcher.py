"""Fetching a set's files from an unreliable store: every response is checked, and retried until it is right."""

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataloading.reading.byte_ranges import ByteRange, merge_ranges
from dataloading.reading.read_counters import ReadCounters
from dataloading.reading.thread_map import ThreadMap
from mcl_dist.config import byte_size, choice, number
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy, TransientError

PART_BYTES = 2**25  # of a shard, in one request
NUM_REQUESTS = 16  # of a process at a time


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How a remote set is read.

    Attributes:
        fetch: `whole` shards into the cache, or only the `ranges` of bytes that are needed, each time.
        cache_limit: bytes of shards in the cache; exceeded only while more than that is being read.
        retry_seconds: how long a failing request is retried.
        request_seconds: time limit of one request; a second more for each MiB.
    """

    fetch: str = choice("whole", "ranges")
    cache_limit: int | None = byte_size(None)
    retry_seconds: float = number(300.0, minimum=0)
    request_seconds: float = number(30.0, minimum=0.01)

    def retry_policy(self, counters: ReadCounters) -> RetryPolicy:
        """The policy for a set's requests, which counts failures in `counters`."""
        return RetryPolicy(self.retry_seconds, self.request_seconds, failures=counters.retries)


class Fetcher:
    """Files of one set; thread-safe.

    All methods raise `MissingFileError` for a file that does not exist, and `UserError` when the store cannot be used
    or keeps failing for longer than the folder's retry policy allows.
    """

    def __init__(self, folder: Folder, counters: ReadCounters) -> None:
        self.url = folder.display_url
        self._folder = folder
        self._counters = counters
        self._requests = ThreadMap(NUM_REQUESTS, "fetch")

    def close(self) -> None:
        """End all waits; requests in progress end by themselves."""
        self._folder.retry.ended.set()
        self._requests.close()

    def small_file(self, name: str, max_bytes: int, is_valid: Callable[[bytes], bool]) -> bytes:
        """A whole file, or its first `max_bytes` when it has more.

        Invalid bytes that arrive twice alike are damaged in the store, and are returned.
        """
        return self._checked(name, 0, max_bytes, is_valid, may_end=True)

    def shard(self, name: str, size: int, sha256: str, descriptor: int) -> bool:
        """Write a file's first `size` bytes to an open local file; whether they have the digest.

        Bytes with another digest that arrive twice alike are damaged in the store; they may also be fewer.
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
                raise TransientError("wrong_digest", f"{self.url}/{name}: its digest differs from the manifest's")
            return found == sha256

        return self._folder.retry.call(attempt)

    def pieces(self, name: str, extents: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """The bytes at each (offset, size), int64 (n, 2), with the CRC-32 of each, uint32 (n,).

        Neighbours share a request. Wrong or short bytes that arrive twice alike are returned.
        """
        pieces: list[bytes] = [b""] * len(extents)

        def cut(data: bytes, start: int, numbers: tuple[int, ...]) -> list[bytes]:
            return [data[offset - start : offset - start + size] for offset, size in extents[list(numbers)].tolist()]

        def fetch(wanted: ByteRange) -> None:
            def is_valid(data: bytes) -> bool:
                found = cut(data, wanted.start, wanted.pieces)
                return list(map(zlib.crc32, found)) == list(crcs[list(wanted.pieces)])

            data = self._checked(name, wanted.start, wanted.end, is_valid)
            for number_of, piece in zip(wanted.pieces, cut(data, wanted.start, wanted.pieces), strict=True):
                pieces[number_of] = piece

        self._requests.map(fetch, merge_ranges(extents))
        return pieces

    def _checked(
        self, name: str, start: int, end: int, is_valid: Callable[[bytes], bool], *, may_end: bool = False
    ) -> bytes:
        """Valid bytes of a range, or invalid ones that arrived twice alike; `may_end` allows a shorter file."""
        seen: set[int] = set()

        def attempt() -> bytes:
            data = self._request(name, start, end, 0 if may_end else end - start)
            is_short = len(data) < end - start and not may_end
            if not is_short and is_valid(data):
                return data
            if (checksum := zlib.crc32(data)) not in seen:
                seen.add(checksum)
                what = f"{self.url}/{name}: {len(data)} bytes from {start}"
                raise TransientError("short_body" if is_short else "wrong_digest", what)
            if is_short and self._request(name, start + len(data), end, 0):
                raise TransientError("short_body", f"{self.url}/{name}: {len(data)} bytes from {start}, and more after")
            return data

        return self._folder.retry.call(attempt)

    def _request(self, name: str, start: int, end: int, num_bytes: int) -> bytes:
        self._counters.add("requests")
        data = self._folder.read_range(name, start, end, num_bytes=num_bytes)
        self._counters.add("bytes_read", len(data))
        return data


def write_at(descriptor: int, data: bytes, start: int) -> None:
    """Write all of the data; one system call may write less."""
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

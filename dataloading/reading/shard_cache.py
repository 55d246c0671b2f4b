"""A cache of files on a local disk, shared by all processes of a machine; the file with the latest next use goes first.

A file is named by its SHA-256, `DIGEST.tar`. During the fetch it is `DIGEST.partial` under an exclusive lock; it is
renamed when its digest is right, so a file with its final name is whole. Readers hold a shared lock. A file that is
damaged at its source is `DIGEST.damaged`: its undamaged samples are still used. A process lists the files that it will
read next in a `reader-….next`, which it keeps locked. All locks end with their holders: unlocked files of these three
kinds were left by killed processes, and are removed when the cache is next opened.
"""

import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dataloading.reading.file_lock import LockedFile, lock_file
from dataloading.reading.read_counters import ReadCounters
from mcl_dist.storage.folder import readable_errors

DAMAGED, PARTIAL, NEXT = ".damaged", ".partial", ".next"
LOCK = "lock"
# Fills an open local file; whether it then has the digest in its name.
Fill = Callable[[int], bool]


class ShardCache:
    """Files by the digest of their bytes: sets may share a cache, and a rebuilt set finds no stale files in it.

    The cache exceeds `limit` bytes only by files that are being read, or fetched for a waiting reader. All methods
    raise `UserError` when the disk fails or is full.
    """

    def __init__(self, folder: Path, limit: int | None, counters: ReadCounters, suffix: str = ".tar") -> None:
        self._folder = folder
        self._limit = limit
        self._counters = counters
        self._suffix = suffix
        self._expected: tuple[str, ...] = ()
        with readable_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                self._sweep()
                self._reader = lock_file(folder / f"reader-{uuid.uuid4().hex}{NEXT}", create=True)

    def close(self) -> None:
        """Withdraw what this process expected to read."""
        if self._reader is not None:
            with suppress(OSError):
                self._reader.path.unlink()
            self._reader.close()
            self._reader = None

    def expect(self, digests: Sequence[str]) -> None:
        """Replace the files that this process will read next, the soonest first."""
        expected = tuple(dict.fromkeys(digests))
        if expected == self._expected or self._reader is None:
            return
        self._expected = expected
        with readable_errors(str(self._folder)), self._exclusive():
            os.ftruncate(self._reader.descriptor, 0)
            os.pwrite(self._reader.descriptor, "\n".join(expected).encode(), 0)

    def holds(self, digest: str) -> bool:
        """Whether the file is in the cache."""
        return any(path.exists() for path in self._paths(digest))

    def open(self, digest: str, size: int, fill: Fill) -> LockedFile:
        """The file, fetched on a miss; it is kept for as long as it is open."""
        with readable_errors(str(self._folder)):
            while True:
                if (file := self._lookup(digest)) is not None:
                    self._counters.add("cache_hits")
                    return file
                partial = self._partial(digest)
                if (file := lock_file(partial, create=True, wait=False)) is None:
                    # Wait for the other process. Its lock becomes a reader's, which a shared lock does not wait for.
                    if (file := lock_file(partial, shared=True)) is not None:
                        file.close()
                        _remove_unlocked(partial)  # a late process created it and could not lock it because of ours
                elif self._fill(file, digest, size, fill, ahead=False):
                    return file

    def fetch_ahead(self, digest: str, size: int, fill: Fill) -> bool:
        """Fetch an expected file; False when only evicting files expected sooner would make space."""
        with readable_errors(str(self._folder)):
            if self.holds(digest):
                return True
            file = lock_file(self._partial(digest), create=True, wait=False)
            if file is None:  # another process fetches it
                return True
            is_there = self._fill(file, digest, size, fill, ahead=True)
            file.close()
            return is_there or self.holds(digest)

    def discard(self, digest: str, file: LockedFile) -> bool:
        """Remove an opened file that was damaged in the cache; False when it was damaged at its source."""
        whole, damaged = self._paths(digest)
        with readable_errors(str(self._folder)):
            if file.is_at(whole):
                self._counters.add("cache_repairs")
                whole.unlink(missing_ok=True)
            return not file.is_at(damaged)

    def _paths(self, digest: str) -> tuple[Path, Path]:
        return self._folder / f"{digest}{self._suffix}", self._folder / f"{digest}{DAMAGED}"

    def _lookup(self, digest: str) -> LockedFile | None:
        for path in self._paths(digest):
            if (file := lock_file(path, shared=True)) is not None:
                os.utime(file.descriptor)  # of the files that no process expects, the least recently used goes first
                return file
        return None

    def _partial(self, digest: str) -> Path:
        return self._folder / f"{digest}{PARTIAL}"

    def _fill(self, file: LockedFile, digest: str, size: int, fill: Fill, *, ahead: bool) -> bool:
        """Fill the locked, empty file; False when the file has arrived meanwhile, or a prefetch finds no space."""
        try:
            if self.holds(digest) or not self._reserve(file, digest, size, ahead):
                file.path.unlink()
                file.close()
                return False
            whole, damaged = self._paths(digest)
            file.path.replace(whole if fill(file.descriptor) else damaged)
        except BaseException:
            file.path.unlink(missing_ok=True)
            file.close()
            raise
        self._counters.add("cache_misses")
        file.downgrade()
        return True

    def _reserve(self, file: LockedFile, digest: str, size: int, ahead: bool) -> bool:
        """Evict until the file fits, then give it its size, by which other processes count it."""
        if self._limit is None:
            return True
        with self._exclusive():
            sizes = self._sizes()
            excess = sum(sizes.values()) + size - self._limit
            next_uses = self._next_uses()
            own_use = next_uses.get(digest, math.inf)
            for path in self._by_next_use(sizes, next_uses):
                if excess <= 0 or (ahead and next_uses.get(path.stem, math.inf) <= own_use < math.inf):
                    break
                if _remove_unlocked(path):
                    self._counters.add("cache_evictions")
                    excess -= sizes[path]
            if ahead and excess > 0:
                return False
            os.ftruncate(file.descriptor, size)
        return True

    def _sizes(self) -> dict[Path, int]:
        sizes = {}
        for path in self._folder.iterdir():
            if path.suffix in (self._suffix, DAMAGED, PARTIAL):
                with suppress(FileNotFoundError):  # a fetch may end at any time: it needs no exclusive access
                    sizes[path] = path.stat().st_size
        return sizes

    def _by_next_use(self, sizes: dict[Path, int], next_uses: dict[str, int]) -> list[Path]:
        """Whole and damaged files in order of eviction: unexpected ones by age, then those with the latest next use."""

        def age(path: Path) -> float:
            with suppress(FileNotFoundError):
                return -path.stat().st_mtime
            return 0.0

        evictable = [path for path in sizes if path.suffix != PARTIAL]
        return sorted(evictable, key=lambda path: (next_uses.get(path.stem, math.inf), age(path)), reverse=True)

    def _next_uses(self) -> dict[str, int]:
        """For each expected file, the number of files read before it, by the process that needs it soonest."""
        soonest: dict[str, int] = {}
        for path in self._folder.glob(f"*{NEXT}"):
            if _remove_unlocked(path):  # its process has ended
                continue
            with suppress(FileNotFoundError):
                for position, digest in enumerate(path.read_text().split()):
                    soonest[digest] = min(position, soonest.get(digest, position))
        return soonest

    def _sweep(self) -> None:
        for path in list(self._folder.iterdir()):
            if path.suffix in (DAMAGED, PARTIAL, NEXT):
                _remove_unlocked(path)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude evictions by other processes; held for moments, never during a fetch."""
        lock = lock_file(self._folder / LOCK, create=True)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless a living process has it locked; whether it was removed."""
    file = lock_file(path, wait=False)
    if file is None:
        return False
    path.unlink(missing_ok=True)
    file.close()
    return True

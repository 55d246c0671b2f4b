"""Files on a local disk, which all processes of a machine share: fetched once, evicted by next use.

A file is named by its SHA-256, `DIGEST.tar`. While it is being fetched it is `DIGEST.partial` under an exclusive lock,
and takes its name when its digest is right; so whoever finds it finds it whole. Its readers hold a shared lock. One
that is damaged where it came from is `DIGEST.damaged`, for what of it is not. What each process will read next stands
in a `reader-….next` that it holds a lock on. All locks end with their holders: files of these kinds that nobody holds
were left by killed processes, and go when the cache is next opened.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dataloading.reading.file_lock import LockedFile, locked
from dataloading.reading.read_counters import ReadCounters
from mcl_dist.storage.folder import naming

DAMAGED, PARTIAL, NEXT = ".damaged", ".partial", ".next"
LOCK = "lock"
# Fills an open local file, and tells whether it is now the one whose digest is its name.
Fill = Callable[[int], bool]


class ShardCache:
    """Files by the digest of their bytes: sets may share a cache, and a rebuilt one finds nothing stale in it.

    `limit` bytes are exceeded only by files that are being read, or fetched for someone who waits. All methods raise
    `UserError` when the disk fails or is full.
    """

    def __init__(self, folder: Path, limit: int | None, report: ReadCounters, suffix: str = ".tar") -> None:
        self._folder = folder
        self._limit = limit
        self._report = report
        self._suffix = suffix
        self._expected: tuple[str, ...] = ()
        with naming(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._sweep()
                self._reader = locked(folder / f"reader-{uuid.uuid4().hex}{NEXT}", create=True)

    def close(self) -> None:
        """What this process expected to read counts no more."""
        if self._reader is not None:
            with suppress(OSError):
                self._reader.path.unlink()
            self._reader.close()
            self._reader = None

    def expect(self, digests: Sequence[str]) -> None:
        """Files that will be read next, the first first; what was expected before is forgotten."""
        expected = tuple(dict.fromkeys(digests))
        if expected == self._expected or self._reader is None:
            return
        self._expected = expected
        with naming(str(self._folder)), self._alone():
            os.ftruncate(self._reader.descriptor, 0)
            os.pwrite(self._reader.descriptor, "\n".join(expected).encode(), 0)

    def holds(self, digest: str) -> bool:
        """Whether the file is here now."""
        return any(path.exists() for path in self._paths(digest))

    def open(self, digest: str, size: int, fill: Fill) -> LockedFile:
        """The file, fetched if need be; it stays for as long as it is open."""
        with naming(str(self._folder)):
            while True:
                if (file := self._found(digest)) is not None:
                    self._report.add("cache_hits")
                    return file
                partial = self._partial(digest)
                if (file := locked(partial, create=True, wait=False)) is None:
                    # Shared, since it becomes the lock of a reader, which is no reason to wait.
                    if (file := locked(partial, shared=True)) is not None:
                        file.close()
                        _removed(partial)  # of one who came too late, and whom our lock kept from his own
                elif self._filled(file, digest, size, fill, ahead=False):
                    return file

    def fetch_ahead(self, digest: str, size: int, fill: Fill) -> bool:
        """Fetch a file that is expected; False when there is no room but that of files expected sooner."""
        with naming(str(self._folder)):
            if self.holds(digest):
                return True
            file = locked(self._partial(digest), create=True, wait=False)
            if file is None:  # another process is at it
                return True
            is_there = self._filled(file, digest, size, fill, ahead=True)
            file.close()
            return is_there or self.holds(digest)

    def discard(self, digest: str, file: LockedFile) -> bool:
        """Forget the file that was opened here and has gone bad; False when it was damaged where it came from."""
        whole, damaged = self._paths(digest)
        with naming(str(self._folder)):
            if file.is_still(whole):
                self._report.add("cache_repairs")
                whole.unlink(missing_ok=True)
            return not file.is_still(damaged)

    def _paths(self, digest: str) -> tuple[Path, Path]:
        return self._folder / f"{digest}{self._suffix}", self._folder / f"{digest}{DAMAGED}"

    def _found(self, digest: str) -> LockedFile | None:
        for path in self._paths(digest):
            if (file := locked(path, shared=True)) is not None:
                os.utime(file.descriptor)  # of those that nobody expects, the one not used for longest goes first
                return file
        return None

    def _partial(self, digest: str) -> Path:
        return self._folder / f"{digest}{PARTIAL}"

    def _filled(self, file: LockedFile, digest: str, size: int, fill: Fill, *, ahead: bool) -> bool:
        """Whether the locked, empty file is now the wanted one; not if that came meanwhile, or has no room ahead."""
        try:
            if self.holds(digest) or not self._reserved(file, digest, size, ahead):
                file.path.unlink()
                file.close()
                return False
            whole, damaged = self._paths(digest)
            file.path.replace(whole if fill(file.descriptor) else damaged)
        except BaseException:
            file.path.unlink(missing_ok=True)
            file.close()
            raise
        self._report.add("cache_misses")
        file.share()
        return True

    def _reserved(self, file: LockedFile, digest: str, size: int, ahead: bool) -> bool:
        """Make room, and take it: from now on the file counts with its size."""
        if self._limit is None:
            return True
        with self._alone():
            sizes = self._sizes()
            excess = sum(sizes.values()) + size - self._limit
            next_uses = self._next_uses()
            own_use = next_uses.get(digest, math.inf)
            for path in self._by_next_use(sizes, next_uses):
                if excess <= 0 or (ahead and next_uses.get(path.stem, math.inf) <= own_use < math.inf):
                    break
                if _removed(path):
                    self._report.add("cache_evictions")
                    excess -= sizes[path]
            if ahead and excess > 0:
                return False
            os.ftruncate(file.descriptor, size)
        return True

    def _sizes(self) -> dict[Path, int]:
        sizes = {}
        for path in self._folder.iterdir():
            if path.suffix in (self._suffix, DAMAGED, PARTIAL):
                with suppress(FileNotFoundError):  # a fetch ended meanwhile; those need no lock of ours for that
                    sizes[path] = path.stat().st_size
        return sizes

    def _by_next_use(self, sizes: dict[Path, int], next_uses: dict[str, int]) -> list[Path]:
        """Whole and damaged files, the last to be read first, and before them those that nobody expects, by age."""

        def age(path: Path) -> float:
            with suppress(FileNotFoundError):
                return -path.stat().st_mtime
            return 0.0

        evictable = [path for path in sizes if path.suffix != PARTIAL]
        return sorted(evictable, key=lambda path: (next_uses.get(path.stem, math.inf), age(path)), reverse=True)

    def _next_uses(self) -> dict[str, int]:
        """How soon each expected file is needed by whichever process needs it first, in files to be read before."""
        soonest: dict[str, int] = {}
        for path in self._folder.glob(f"*{NEXT}"):
            if _removed(path):  # its process has ended
                continue
            with suppress(FileNotFoundError):
                for place, digest in enumerate(path.read_text().split()):
                    soonest[digest] = min(place, soonest.get(digest, place))
        return soonest

    def _sweep(self) -> None:
        for path in list(self._folder.iterdir()):
            if path.suffix in (DAMAGED, PARTIAL, NEXT):
                _removed(path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process weighs what to keep; held for moments, never while something is fetched."""
        lock = locked(self._folder / LOCK, create=True)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def _removed(path: Path) -> bool:
    """Remove a file unless a living process holds it."""
    file = locked(path, wait=False)
    if file is None:
        return False
    path.unlink(missing_ok=True)
    file.close()
    return True

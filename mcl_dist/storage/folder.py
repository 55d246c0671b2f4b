"""A folder at any fsspec URL, with writes that are whole or absent."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from mcl_dist.errors import UserError
from mcl_dist.storage.retry import RetryPolicy
from mcl_dist.storage.store_requests import asked, connected, failure, without_credentials

Result = TypeVar("Result")
BLOCK_BYTES = 2**25  # of a file, in one request
PARTIAL = re.compile(r"\..+\.\d+\.partial")


class Folder:
    """Reads and writes named files below one URL (`/data/set`, `s3://bucket/set`, `memory://set`).

    What a store does not do at once is asked for again, as long as there is `patience`. Every method that fails for a
    reason outside the program raises `UserError` naming the file's URL.
    """

    def __init__(self, url: str, patience: RetryPolicy | None = None) -> None:
        self.url = str(url).rstrip("/")
        self.patience = patience or RetryPolicy()
        with naming(self.url):
            self._filesystem, self._root = connected(self.url)

    def with_patience(self, patience: RetryPolicy) -> Folder:
        """The same folder, with other patience."""
        folder = copy.copy(self)
        folder.patience = patience
        return folder

    @property
    def is_local(self) -> bool:
        """Whether files of this folder are plain files of this machine."""
        return isinstance(self._filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The name as the underlying filesystem spells it."""
        return f"{self._root}/{name}"

    def names(self) -> list[str]:
        """Names of the entries directly below, sorted; empty when the folder does not exist."""

        def attempt() -> list[str]:
            self._filesystem.invalidate_cache()
            if not self._is_there(self._root):
                return []
            return sorted(Path(entry).name for entry in self._asked("ls", self._root, detail=False))

        return self._patiently("", attempt)

    def is_folder(self) -> bool:
        """Whether the URL is a folder: neither a file nor missing."""
        return self._patiently("", lambda: bool(self._asked("isdir", self._root)))

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files below, by their path relative to the folder; links are followed."""

        def attempt() -> dict[str, int]:
            if self.is_local:
                return dict(_local_files(Path(self._root)))
            self._filesystem.invalidate_cache()
            found = self._asked("find", self._root, detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: int(entry.get("size") or 0) for path, entry in found.items()}

        return self._patiently("", attempt)

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return self._patiently(name, lambda: self._is_there(self.path(name)))

    def size(self, name: str) -> int:
        """Size in bytes; 0 where the store does not tell."""
        return self._patiently(name, lambda: int(self._asked("info", self.path(name)).get("size") or 0))

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self._patiently(name, lambda: bytes(self._asked("cat_file", self.path(name))))

    def head(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a file, all of it when it has no more."""

        def attempt() -> bytes:
            return bytes(self._asked("cat_file", self.path(name), start=0, end=num_bytes, num_bytes=num_bytes))

        return self._patiently(name, attempt)

    def sha256(self, name: str) -> str:
        """Hexadecimal digest of a file, which is never held as a whole."""
        digest = hashlib.sha256()

        def block(start: int) -> bytes:
            return bytes(self._asked("cat_file", self.path(name), start=start, end=start + BLOCK_BYTES))

        for start in range(0, self.size(name), BLOCK_BYTES):
            digest.update(self._patiently(name, partial(block, start)))
        return digest.hexdigest()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file so that readers see all of it or nothing; on local disks it is synced."""

        def attempt() -> None:
            if self.is_local:
                with _whole(Path(self.path(name))) as temporary:
                    temporary.write_bytes(data)
            else:
                # Libraries of stores know no other buffers than bytes.
                self._asked("pipe_file", self.path(name), bytes(data), num_bytes=len(data))

        self._patiently(name, attempt)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it is there already, which stores that know exclusive writes do in one step.

        Data that nobody else would write tells an earlier try of ours, whose answer was lost, from another's file.
        """

        def attempt() -> bool:
            try:
                self._asked("pipe_file", self.path(name), data, mode="create")
            except OSError as error:
                # FileExistsError, or what s3fs makes of "the precondition did not hold".
                if failure(error) or not self._is_there(self.path(name)):
                    raise
                return bytes(self._asked("cat_file", self.path(name))) == data
            return True

        return self._patiently(name, attempt)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file here, visible only when complete; the local file stays."""

        def attempt() -> None:
            if self.is_local:
                with _whole(Path(self.path(name))) as temporary:
                    self._filesystem.cp_file(str(local), str(temporary))
            else:
                self._asked("put_file", str(local), self.path(name), num_bytes=local.stat().st_size)

        self._patiently(name, attempt)

    def get(self, name: str, local: Path) -> None:
        """Copy a file from here to a local path, visible only when complete."""

        def attempt() -> None:
            with _whole(local) as temporary:
                num_bytes = int(self._asked("info", self.path(name)).get("size") or 0)
                self._asked("get_file", self.path(name), str(temporary), num_bytes=num_bytes)

        self._patiently(name, attempt)

    def remove_partials(self) -> None:
        """Remove what killed writers left half-written on a local disk; nobody else may be writing here."""
        if self.is_local:
            for name in self.names():
                if PARTIAL.fullmatch(name):
                    self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it; no error when it is not there."""

        def attempt() -> None:
            with suppress(FileNotFoundError):
                if self._is_there(self.path(name)):
                    self._asked("rm", self.path(name), recursive=True)

        self._patiently(name, attempt)

    def _is_there(self, path: str) -> bool:
        # Not the libraries' own `exists`: to some of them a store that is busy has no such file.
        try:
            self._asked("info", path)
        except FileNotFoundError:
            return False
        return True

    def _asked(self, method: str, *arguments: Any, num_bytes: int = 0, **how: Any) -> Any:
        return asked(self._filesystem, method, *arguments, seconds=self.patience.limit(num_bytes), **how)

    def _patiently(self, name: str, attempt: Callable[[], Result]) -> Result:
        def named() -> Result:
            with naming(f"{self.url}/{name}" if name else self.url):
                return attempt()

        return named() if self.is_local else self.patience.until_it_works(named)


def write_file(url: str, data: bytes) -> None:
    """Write one file at any URL, as `Folder.write` does."""
    folder, slash, name = url.rpartition("/")
    Folder(folder + slash or ".").write(name, data)


def _local_files(root: Path) -> Iterator[tuple[str, int]]:
    # Not fsspec's own walk, which takes a link to a folder for a file.
    waiting: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        if (identity := folder.resolve()) in above:
            continue  # a link to a folder above would never end
        for entry in folder.iterdir():
            if entry.is_dir():
                waiting.append((entry, above | {identity}))
            elif entry.is_file():
                yield entry.relative_to(root).as_posix(), entry.stat().st_size


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name beside the target to write to; it becomes the target when all went well, and goes when not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    _make_folder(target.parent)
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make it and those above it, so that they outlast a power failure."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Turn errors of storage into one line that names the URL, without credentials, and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise _told(url, "no such file or folder; check the path") from error
    except PermissionError as error:
        raise _told(url, "permission denied; check its owner or your credentials") from error
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _told(url, "no space left; free some, then run the same command again") from error
        raise _told(url, _reason(error)) from error
    except Exception as error:
        # A store's library has errors of its own; what Python itself raises beyond the above is a mistake of ours.
        if isinstance(error, UserError) or type(error).__module__ == "builtins":
            raise
        raise _told(url, _reason(error)) from error


def _told(url: str, reason: str) -> UserError:
    return UserError(without_credentials(f"{url}: {reason}"))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

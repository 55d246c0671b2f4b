"""A folder at any fsspec URL, with atomic writes."""

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
from mcl_dist.storage.store_requests import (
    classify_failure,
    error_chain,
    http_status,
    open_filesystem,
    request,
    without_credentials,
)

Result = TypeVar("Result")
BLOCK_BYTES = 2**25  # of a file, in one request
PARTIAL = re.compile(r"\..+\.\d+\.partial")
RANGE_NOT_SATISFIABLE = 416  # HTTP status: the file ends before the range begins


class MissingFileError(UserError):
    """The store works and does not have the file."""


class Folder:
    """Reads and writes named files below one URL (`/data/set`, `s3://bucket/set`, `memory://set`).

    Transient failures of a store are retried under the policy `retry`; each process opens connections of its own. Every
    method that fails for a reason outside the program raises `UserError` with the file's URL.
    """

    def __init__(self, url: str, retry: RetryPolicy | None = None) -> None:
        self.url = str(url).rstrip("/")
        self.retry = retry or RetryPolicy()
        self._open()

    def with_retry(self, retry: RetryPolicy) -> Folder:
        """The same folder under another retry policy."""
        folder = copy.copy(self)
        folder.retry = retry
        return folder

    @property
    def display_url(self) -> str:
        """The URL without credentials, for messages."""
        return without_credentials(self.url)

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem; a forked process gets its own."""
        if self._owner != os.getpid():
            self._open()
        return self._filesystem

    @property
    def is_local(self) -> bool:
        """Whether files of this folder are plain files of this machine."""
        return isinstance(self._filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file's path in the filesystem."""
        return f"{self._root}/{name}"

    def names(self) -> list[str]:
        """Names of the entries directly below, sorted; empty when the folder does not exist."""

        def attempt() -> list[str]:
            self.filesystem.invalidate_cache()
            if not self._exists(self._root):
                return []
            return sorted(Path(entry).name for entry in self._request("ls", self._root, detail=False))

        return self._call("", attempt)

    def is_folder(self) -> bool:
        """Whether the URL is a folder: neither a file nor missing."""
        return self._call("", lambda: bool(self._request("isdir", self._root)))

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files below, by their path relative to the folder; links are followed."""

        def attempt() -> dict[str, int]:
            if self.is_local:
                return dict(_local_files(Path(self._root)))
            self.filesystem.invalidate_cache()
            found = self._request("find", self._root, detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: int(entry.get("size") or 0) for path, entry in found.items()}

        return self._call("", attempt)

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        return self._call(name, lambda: self._exists(self.path(name)))

    def size(self, name: str) -> int:
        """Size in bytes; 0 where the store does not report one."""
        return self._call(name, lambda: int(self._request("info", self.path(name)).get("size") or 0))

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self._call(name, lambda: bytes(self._request("cat_file", self.path(name))))

    def head(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a file; all of it when it has fewer."""

        options = {"start": 0, "end": num_bytes, "num_bytes": num_bytes}
        return self._call(name, lambda: bytes(self._request("cat_file", self.path(name), **options)))

    def read_range(self, name: str, start: int, end: int, *, num_bytes: int = 0) -> bytes:
        """Bytes `start` to `end` of a file, fewer when it ends before: one request, without retries.

        Args:
            name, start, end: of the file, and offsets in bytes.
            num_bytes: expected size, by which the request's time limit grows.

        Raises:
            MissingFileError: the file does not exist.
            UserError: the request failed; `classify_failure` of its cause shows whether a retry may help.
        """
        location = f"{self.display_url}/{name}"
        try:
            with readable_errors(location):
                if self.is_local:
                    end = min(end, self.filesystem.size(self.path(name)))  # Python allocates what a read asks for
                data = bytes(self._request("cat_file", self.path(name), start=start, end=end, num_bytes=num_bytes))
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise MissingFileError(str(error)) from None
            if RANGE_NOT_SATISFIABLE in map(http_status, error_chain(error.__cause__)):
                return b""
            raise
        if len(data) > end - start:
            raise UserError(
                f"{location}: the server sends {len(data)} bytes for a range of {end - start}; use a server that "
                "supports HTTP range requests"
            )
        return data

    def sha256(self, name: str) -> str:
        """Hexadecimal digest of a file, read in blocks of bounded memory."""
        digest = hashlib.sha256()

        def block(start: int) -> bytes:
            return bytes(self._request("cat_file", self.path(name), start=start, end=start + BLOCK_BYTES))

        for start in range(0, self.size(name), BLOCK_BYTES):
            digest.update(self._call(name, partial(block, start)))
        return digest.hexdigest()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file atomically: readers see all of it or nothing. On local disks it is synced."""

        def attempt() -> None:
            if self.is_local:
                with _atomic(Path(self.path(name))) as temporary:
                    temporary.write_bytes(data)
            else:
                # Store libraries accept no buffers but bytes.
                self._request("pipe_file", self.path(name), bytes(data), num_bytes=len(data))

        self._call(name, attempt)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, in one step on stores with exclusive writes; whether it holds `data`.

        The data must be unique to the writer: it distinguishes an earlier try, whose response was lost, from another's
        file.
        """

        def attempt() -> bool:
            try:
                self._request("pipe_file", self.path(name), data, mode="create")
            except OSError as error:
                # FileExistsError, or what s3fs makes of "the precondition did not hold".
                if classify_failure(error) or not self._exists(self.path(name)):
                    raise
                return bytes(self._request("cat_file", self.path(name))) == data
            return True

        return self._call(name, attempt)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file to this folder, visible only when complete; the local file stays."""

        def attempt() -> None:
            if self.is_local:
                with _atomic(Path(self.path(name))) as temporary:
                    self.filesystem.cp_file(str(local), str(temporary))
            else:
                self._request("put_file", str(local), self.path(name), num_bytes=local.stat().st_size)

        self._call(name, attempt)

    def get(self, name: str, local: Path) -> None:
        """Copy a file of this folder to a local path, visible only when complete."""

        def attempt() -> None:
            with _atomic(local) as temporary:
                num_bytes = int(self._request("info", self.path(name)).get("size") or 0)
                self._request("get_file", self.path(name), str(temporary), num_bytes=num_bytes)

        self._call(name, attempt)

    def remove_partials(self) -> None:
        """Remove partial files of killed writers on a local disk; no other process may be writing here."""
        if self.is_local:
            for name in self.names():
                if PARTIAL.fullmatch(name):
                    self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it; no error when it does not exist."""

        def attempt() -> None:
            with suppress(FileNotFoundError):
                if self._exists(self.path(name)):
                    self._request("rm", self.path(name), recursive=True)

        self._call(name, attempt)

    def _open(self) -> None:
        with readable_errors(self.url):
            self._filesystem, self._root = open_filesystem(self.url)
        self._owner = os.getpid()

    def _exists(self, path: str) -> bool:
        # Not the libraries' own `exists`: some of them report a file of a busy store as missing.
        try:
            self._request("info", path)
        except FileNotFoundError:
            return False
        return True

    def _request(self, method: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
        return request(self.filesystem, method, *arguments, seconds=self.retry.timeout(num_bytes), **options)

    def _call(self, name: str, attempt: Callable[[], Result]) -> Result:
        def attempt_once() -> Result:
            with readable_errors(f"{self.display_url}/{name}" if name else self.url):
                return attempt()

        return attempt_once() if self.is_local else self.retry.call(attempt_once)


def write_file(url: str, data: bytes) -> None:
    """Write one file at any URL, as `Folder.write` does."""
    folder, slash, name = url.rpartition("/")
    Folder(folder + slash or ".").write(name, data)


def _local_files(root: Path) -> Iterator[tuple[str, int]]:
    # fsspec's own walk mistakes a link to a folder for a file.
    pending: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    while pending:
        folder, above = pending.pop()
        if (identity := folder.resolve()) in above:
            continue  # a link to a folder above would never end
        for entry in folder.iterdir():
            if entry.is_dir():
                pending.append((entry, above | {identity}))
            elif entry.is_file():
                yield entry.relative_to(root).as_posix(), entry.stat().st_size


@contextmanager
def _atomic(target: Path) -> Iterator[Path]:
    """A temporary path beside the target; renamed to the target on success, removed on an error."""
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
    """Create the folder and its parents, synced so that they survive a power failure."""
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
def readable_errors(url: str) -> Iterator[None]:
    """Turn errors of storage into a one-line `UserError` with the URL, without credentials, and a remedy."""
    try:
        yield
    except Exception as error:
        # Store libraries have error types of their own; any other built-in error is a bug.
        is_bug = type(error).__module__ == "builtins" and not isinstance(error, OSError | ValueError | ImportError)
        if is_bug or isinstance(error, UserError):
            raise
        raise UserError(without_credentials(f"{url}: {_reason(error)}")) from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file or folder; check the path"
        case PermissionError():
            return "permission denied; check its owner or your credentials"
        case OSError(errno=errno.ENOSPC):
            return "no space left; free some, then run the same command again"
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""A folder at any fsspec URL, with writes that are whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mcl_dist.errors import UserError


class Folder:
    """Reads and writes named files below one URL (`/data/set`, `s3://bucket/set`, `memory://set`).

    Every method that fails for a reason outside the program raises `UserError` naming the file's URL.
    """

    def __init__(self, url: str) -> None:
        self.url = str(url).rstrip("/")
        with _naming(self.url):
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url)

    @property
    def is_local(self) -> bool:
        """Whether files of this folder are plain files of this machine."""
        return isinstance(self._filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The name as the underlying filesystem spells it."""
        return f"{self._root}/{name}"

    def names(self) -> list[str]:
        """Names of the entries directly below, sorted; empty when the folder does not exist."""
        with _naming(self.url):
            self._filesystem.invalidate_cache()
            if not self._filesystem.exists(self._root):
                return []
            return sorted(Path(entry).name for entry in self._filesystem.ls(self._root, detail=False))

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        with _naming(f"{self.url}/{name}"):
            return bool(self._filesystem.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Size in bytes."""
        with _naming(f"{self.url}/{name}"):
            return int(self._filesystem.size(self.path(name)))

    def read(self, name: str) -> bytes:
        """The whole file."""
        with _naming(f"{self.url}/{name}"):
            return bytes(self._filesystem.cat_file(self.path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that readers see all of it or nothing; on local disks it is synced."""
        with _naming(f"{self.url}/{name}"):
            if self.is_local:
                self._write_local(Path(self.path(name)), data)
            else:
                self._filesystem.pipe_file(self.path(name), data)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file here, visible only when complete; the local file stays."""
        with _naming(f"{self.url}/{name}"):
            if self.is_local:
                target = Path(self.path(name))
                partial = _partial(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._filesystem.cp_file(str(local), str(partial))
                _commit(partial, target)
            else:
                self._filesystem.put_file(str(local), self.path(name))

    def get(self, name: str, local: Path) -> None:
        """Copy a file from here to a local path, visible only when complete."""
        with _naming(f"{self.url}/{name}"):
            partial = _partial(local)
            local.parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.get_file(self.path(name), str(partial))
            _commit(partial, local)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it; no error when it is not there."""
        with _naming(f"{self.url}/{name}"):
            if self._filesystem.exists(self.path(name)):
                self._filesystem.rm(self.path(name), recursive=True)

    @staticmethod
    def _write_local(target: Path, data: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            partial.write_bytes(data)
            _commit(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _partial(target: Path) -> Path:
    """A name beside the target that no reader looks for; one per process."""
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _commit(partial: Path, target: Path) -> None:
    """Make the bytes durable, then the name."""
    for path, flags in ((partial, os.O_RDONLY), (target.parent, os.O_RDONLY | os.O_DIRECTORY)):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if path is partial:
            partial.replace(target)


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn errors of storage into one line that names the URL and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such file or folder; check the path") from error
    except PermissionError as error:
        raise UserError(f"{url}: permission denied; check its owner or your credentials") from error
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{url}: no space left; free some, then run the same command again") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{url}: {reason}") from error

"""Locks on files that end with their holder, `kill -9` included."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path


class LockedFile:
    """An open file under a lock, which lasts until it is closed, or its process ends.

    A forked child closes what it inherited: or the lock would live on in it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        _OPEN.add(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock free."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def share(self) -> None:
        """Let others hold the lock as well, as far as they share it."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def is_still(self, path: Path) -> bool:
        """Whether the path leads to this file, and not to none or another."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), path.stat())
        except FileNotFoundError:
            return False


def locked(path: Path, *, create: bool = False, shared: bool = False, wait: bool = True) -> LockedFile | None:
    """The file under a lock; None when it is gone, or when another holds it and we do not wait.

    Raises:
        OSError: it cannot be opened, or its disk knows no locks.
    """
    mode = os.O_RDWR | (os.O_CREAT if create else 0)
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            file = LockedFile(path, os.open(path, mode, 0o644))
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file.descriptor, kind)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            file.close()
            raise
        if file.is_still(path):
            return file
        file.close()  # removed or renamed while we waited


_OPEN: weakref.WeakSet[LockedFile] = weakref.WeakSet()


def _close_inherited() -> None:
    for file in list(_OPEN):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)

"""File locks that end with their holder, `kill -9` included."""

import fcntl
import os
import weakref
from pathlib import Path


class LockedFile:
    """An open file under a lock, which is released when the file is closed or its process ends.

    A forked child closes inherited files; otherwise the lock would survive its holder.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        _OPEN.add(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def downgrade(self) -> None:
        """Turn the exclusive lock into a shared one."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def is_at(self, path: Path) -> bool:
        """Whether the path leads to this file."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), path.stat())
        except FileNotFoundError:
            return False


def lock_file(path: Path, *, create: bool = False, shared: bool = False, wait: bool = True) -> LockedFile | None:
    """The file under a lock; None when it does not exist, or when another process holds it and `wait` is false.

    Raises:
        OSError: the file cannot be opened, or its disk does not support locks.
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
        if file.is_at(path):
            return file
        file.close()  # removed or renamed during the wait


_OPEN: weakref.WeakSet[LockedFile] = weakref.WeakSet()


def _close_inherited() -> None:
    for file in list(_OPEN):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)

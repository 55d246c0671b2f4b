"""One builder per destination: a file lock on a local disk, a lease in an object store."""

import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

WORK_FOLDER = ".building"
LOCK = "lock"
LEASE = "building.lease"
REFRESH_SECONDS = 20.0
STALE_SECONDS = 120.0  # six missed refreshes: longer than a short outage of the store
JUST_STARTED = "it has just started"


@dataclass(frozen=True)
class BuildLock:
    """The right to write at a destination.

    Attributes:
        work: an empty local folder for unfinished files, on the disk of the destination if that is local.
        check: raises `UserError` when the lock is lost; call it before every write that counts.
        previous_holder: the builder whose expired lease was taken over, None without one.
    """

    work: Path
    check: Callable[[], None]
    previous_holder: str | None = None


@contextmanager
def hold_build_lock(destination: Folder) -> Iterator[BuildLock]:
    """Lock the destination for the block, and remove the partial files of a killed builder.

    Raises:
        UserError: another builder holds the lock, or the destination is not writable.
    """
    with _file_lock(destination) if destination.is_local else _lease(destination) as lock:
        yield lock


@contextmanager
def _file_lock(destination: Folder) -> Iterator[BuildLock]:
    work = Path(destination.path(WORK_FOLDER))
    is_new = not work.parent.exists()
    try:
        file = _open_locked(work, destination.url)
    except OSError as error:
        raise UserError(f"{destination.url}: {error.strerror}; name a folder that can be written to") from error
    with file:
        try:
            for entry in work.iterdir():
                if entry.name != LOCK:
                    entry.unlink()
            destination.remove_partials()
            yield BuildLock(work, partial(_check_file_lock, file, work, destination.url))
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # it is not empty: the build wrote files
                    work.parent.rmdir()


def _open_locked(work: Path, url: str) -> TextIO:
    """Open and lock the lock file. The system releases the lock when its holder ends, even by `kill -9`."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            file = (work / LOCK).open("a+")
        except FileNotFoundError:  # the holder has just finished and removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise _locked_error(url, file.read().strip() or JUST_STARTED) from error
        if _is_same_file(file, work / LOCK):
            file.truncate(0)
            file.write(_name(_this_process()))
            file.flush()
            return file
        file.close()


def _check_file_lock(lock: TextIO, work: Path, url: str) -> None:
    if not _is_same_file(lock, work / LOCK):
        raise UserError(f"{url}: removed while a build was writing there; run the same command again")


def _is_same_file(file: TextIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def _lease(destination: Folder) -> Iterator[BuildLock]:
    lease = Lease(destination)
    previous_holder = lease.acquire()
    try:
        with lease.keep_fresh(), tempfile.TemporaryDirectory() as work:
            yield BuildLock(Path(work), lease.refresh, previous_holder)
    finally:
        lease.release()


class Lease:
    """An object in the store that names the builder and the time of its last refresh."""

    def __init__(self, destination: Folder) -> None:
        self._destination = destination
        # A refresh and a release give up early when the store does not answer: the lease expires by itself.
        retry = replace(destination.retry, seconds=min(REFRESH_SECONDS, destination.retry.seconds))
        self._short_retry_destination = destination.with_retry(retry)
        self._holder = {**_this_process(), "id": uuid.uuid4().hex}

    def acquire(self) -> str | None:
        """Acquire the lease; returns the name of the holder whose lease was taken over, None without one.

        Raises:
            UserError: the holder is still alive.
        """
        holder = _read_holder(self._destination)
        if holder is not None:
            if not _is_gone(holder):
                raise _locked_error(self._destination.url, _name(holder))
            self._destination.remove(LEASE)
        if not self._destination.create(LEASE, self._to_json()):
            raise _locked_error(self._destination.url, JUST_STARTED)
        return None if holder is None else _name(holder)

    @contextmanager
    def keep_fresh(self) -> Iterator[None]:
        """Refresh the lease every `REFRESH_SECONDS` during the block."""
        done = threading.Event()
        thread = threading.Thread(target=self._refresh_until, args=(done,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def refresh(self, destination: Folder | None = None) -> None:
        """Renew the lease; `UserError` when another builder took it over."""
        destination = destination or self._destination
        holder = _read_holder(destination)
        if holder is None or holder.get("id") != self._holder["id"]:
            now = "nobody" if holder is None else _name(holder)
            raise UserError(
                f"{destination.url}: this build's lease was lost to {now}; let one of them finish, then try again"
            )
        destination.write(LEASE, self._to_json())

    def release(self) -> None:
        """Remove the lease if this builder still holds it."""
        with suppress(UserError):  # the lease expires by itself
            if (_read_holder(self._short_retry_destination) or {}).get("id") == self._holder["id"]:
                self._short_retry_destination.remove(LEASE)

    def _refresh_until(self, done: threading.Event) -> None:
        while not done.wait(REFRESH_SECONDS):
            with suppress(UserError):  # `check` raises it before the next write that counts
                self.refresh(self._short_retry_destination)

    def _to_json(self) -> bytes:
        return json.dumps({**self._holder, "time": time.time()}).encode()


def _read_holder(destination: Folder) -> dict[str, Any] | None:
    if not destination.exists(LEASE):
        return None
    try:
        holder = json.loads(destination.read(LEASE))
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the lease has expired, or its holder is a process of this machine that has ended."""
    refreshed = holder.get("time")
    if not isinstance(refreshed, float) or time.time() - refreshed > STALE_SECONDS:
        return True
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _locked_error(url: str, holder: str) -> UserError:
    return UserError(f"{url}: another build is writing there ({holder}); let it finish or end it, then try again")

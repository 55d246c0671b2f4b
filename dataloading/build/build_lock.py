"""One builder at a time: a lock on a local disk, which ends with its holder, and a lease in an object store."""

from __future__ import annotations

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
STALE_SECONDS = 120.0  # six refreshes missed: more than a store's bad minute


@dataclass(frozen=True)
class BuildLock:
    """The right to write at a destination.

    Attributes:
        work: an empty local folder for files being written, on the destination's own disk where it has one.
        taken_from: the earlier holder whose lease had run out, None when there was none.
        check: to be called before each write that counts: `UserError` when the right is lost.
    """

    work: Path
    check: Callable[[], None]
    taken_from: str | None = None


@contextmanager
def claimed(destination: Folder) -> Iterator[BuildLock]:
    """Hold the destination until the block ends; what a killed builder left half-written is removed.

    Raises:
        UserError: another builder holds it, or it cannot be written to.
    """
    with _locked(destination) if destination.is_local else _leased(destination) as claim:
        yield claim


@contextmanager
def _locked(destination: Folder) -> Iterator[BuildLock]:
    work = Path(destination.path(WORK_FOLDER))
    is_new = not work.parent.exists()
    try:
        lock = _lock(work, destination.url)
    except OSError as error:
        raise UserError(f"{destination.url}: {error.strerror}; name a folder that can be written to") from error
    with lock:
        try:
            for entry in work.iterdir():
                if entry.name != LOCK:
                    entry.unlink()
            destination.remove_partials()
            yield BuildLock(work, partial(_check_lock, lock, work, destination.url))
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # it holds what was built
                    work.parent.rmdir()


def _lock(work: Path, url: str) -> TextIO:
    """The open lock file, held; its holder's end gives it free, `kill -9` included."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            file = (work / LOCK).open("a+")
        except FileNotFoundError:  # its holder has just finished, and removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise _held(url, file.read().strip() or "it has just begun") from error
        if _is_at(file, work / LOCK):
            file.truncate(0)
            file.write(_name(_myself()))
            file.flush()
            return file
        file.close()


def _check_lock(lock: TextIO, work: Path, url: str) -> None:
    if not _is_at(lock, work / LOCK):
        raise UserError(f"{url}: removed while a build was writing there; run the same command again")


def _is_at(file: TextIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def _leased(destination: Folder) -> Iterator[BuildLock]:
    lease = Lease(destination)
    taken_from = lease.take()
    try:
        with lease.kept(), tempfile.TemporaryDirectory() as work:
            yield BuildLock(Path(work), lease.refresh, taken_from)
    finally:
        lease.give_back()


class Lease:
    """An object that says who builds and when they last said so."""

    def __init__(self, destination: Folder) -> None:
        self._destination = destination
        # Beside the work and at its end nobody waits long for a store that does not answer: leases run out.
        patience = replace(destination.patience, seconds=min(REFRESH_SECONDS, destination.patience.seconds))
        self._hurried = destination.with_patience(patience)
        self._me = {**_myself(), "id": uuid.uuid4().hex}

    def take(self) -> str | None:
        """Take the lease; the name of its earlier holder when that one is gone, else None.

        Raises:
            UserError: its holder is still there.
        """
        holder = _holder(self._destination)
        if holder is not None:
            if not _is_gone(holder):
                raise _held(self._destination.url, _name(holder))
            self._destination.remove(LEASE)
        if not self._destination.create(LEASE, self._text()):
            raise _held(self._destination.url, "it has just begun")
        return None if holder is None else _name(holder)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Refresh the lease from time to time while the block lasts."""
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def refresh(self, destination: Folder | None = None) -> None:
        """Say that we are still here; `UserError` when another holder took over."""
        destination = destination or self._destination
        holder = _holder(destination)
        if holder is None or holder.get("id") != self._me["id"]:
            now = "nobody" if holder is None else _name(holder)
            raise UserError(
                f"{destination.url}: this build's lease was lost to {now}; let one of them finish, then try again"
            )
        destination.write(LEASE, self._text())

    def give_back(self) -> None:
        """Remove the lease if it is still ours."""
        with suppress(UserError):  # it runs out by itself
            if (_holder(self._hurried) or {}).get("id") == self._me["id"]:
                self._hurried.remove(LEASE)

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(REFRESH_SECONDS):
            with suppress(UserError):  # the next write that counts meets it too, and tells
                self.refresh(self._hurried)

    def _text(self) -> bytes:
        return json.dumps({**self._me, "time": time.time()}).encode()


def _holder(destination: Folder) -> dict[str, Any] | None:
    if not destination.exists(LEASE):
        return None
    try:
        holder = json.loads(destination.read(LEASE))
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {}


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder ended without giving back, as far as can be seen from here."""
    told = holder.get("time")
    if not isinstance(told, float) or time.time() - told > STALE_SECONDS:
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


def _held(url: str, holder: str) -> UserError:
    return UserError(f"{url}: another build is writing there ({holder}); let it finish or end it, then try again")

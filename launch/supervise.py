"""What keeps a run the only one in its folder, and its ranks from outliving whoever started them."""

from __future__ import annotations

import fcntl
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcl_dist.errors import EXIT_FAILURE, UserError

LOCK = "lock"
LOCK_SECONDS = 30.0  # ranks of a run that was just killed may take some of it to go
RETRY_SECONDS = 0.2


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, which ends with this process however it ends.

    Raises:
        UserError: when another run still holds it after half a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another run is training there; end it first, or choose another run.dir")
            time.sleep(RETRY_SECONDS)
        yield


def end_with_launcher() -> None:
    """End this rank when a launcher above it is gone: killed, it cannot end its ranks itself.

    Left alone they would train on, into the folder of the run that replaces theirs.
    """
    descriptors = [os.pidfd_open(pid) for pid in _launchers(os.getppid())]
    threading.Thread(target=_end_with, args=(descriptors,), name="launcher-watch", daemon=True).start()


def _launchers(pid: int) -> Iterator[int]:
    """Process ids of the DeepSpeed and mcl commands above, nearest first."""
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        if b"deepspeed" not in command and b"pretrain" not in command:
            return
        yield pid
        pid = int(status.rpartition(")")[2].split()[1])


def _end_with(descriptors: list[int]) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    if descriptors:
        poll.poll()
        os._exit(EXIT_FAILURE)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

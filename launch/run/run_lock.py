"""What keeps a run the only one in its folder."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.supervision.parent_watch import LEAVE_SECONDS
from mcl_dist.errors import UserError

LOCK = "lock"
LOCK_SECONDS = LEAVE_SECONDS + 10  # ranks of a run whose command was just killed may take some of it to save and go
RETRY_SECONDS = 0.2


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, which ends with this process however it ends.

    Raises:
        UserError: when another run still holds it after a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another run is training there; end it first, or choose another run.dir")
            time.sleep(RETRY_SECONDS)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

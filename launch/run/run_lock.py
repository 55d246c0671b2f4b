"""A lock that admits one run at a time to a run folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.supervision.deepspeed_launcher import LEAVE_SECONDS
from launch.supervision.processes import wait_until
from mcl_dist.errors import UserError

LOCK_FILE = "lock"
LOCK_SECONDS = LEAVE_SECONDS + 10  # the ranks of a run whose command was killed may take LEAVE_SECONDS to save
RETRY_SECONDS = 0.2


@contextmanager
def hold_run_lock(folder: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the run folder's lock; the kernel releases it when this process ends.

    Raises:
        UserError: another run still holds the lock after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        if not wait_until(lambda: _try_lock(file.fileno()), seconds, RETRY_SECONDS):
            raise UserError(f"{folder}: another run is training there; end it first, or choose another run.dir")
        yield


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False

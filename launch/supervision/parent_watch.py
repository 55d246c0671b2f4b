"""A rank's watch on its launcher and supervisor: once killed, they can neither end nor restart it."""

import os
import select
import threading
import time
from collections.abc import Iterator

from launch.supervision.deepspeed_launcher import RUNTIME
from launch.supervision.processes import ProcessEntry
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import EXIT_FAILURE

LEAVE_SECONDS = 50.0  # to save; the next run waits a little longer for the run folder's lock


def stop_with_parent(stop: StopRequest, seconds: float = LEAVE_SECONDS) -> None:
    """Request this rank's stop when its launcher or supervisor is gone, and exit after so many seconds.

    Without a parent it would train on, into the folder of the run that replaces its own.
    """
    descriptors = [os.pidfd_open(pid) for pid in _launchers()]
    if descriptors:
        threading.Thread(target=_watch, args=(descriptors, stop, seconds), name="launcher-watch", daemon=True).start()


def _launchers() -> Iterator[int]:
    """Process ids of the launcher and, above it, of the supervisor or of DeepSpeed's other processes."""
    pid = os.getppid()
    while pid > 1 and b"deepspeed" in (process := ProcessEntry(pid)).command:
        yield pid
        pid = process.parent
    if RUNTIME in os.environ:
        yield pid


def _watch(descriptors: list[int], stop: StopRequest, seconds: float) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    stop.request("launcher gone")
    time.sleep(seconds)
    os._exit(EXIT_FAILURE)

"""Processes of this machine, as listed in /proc, their sessions, and waiting for a condition."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")
POLL_SECONDS = 0.02
STATE, PARENT, SESSION = 0, 1, 3  # fields after the command's name in /proc/PID/stat
KILL_SECONDS = 30.0  # a process that survives SIGKILL for so long waits for a device that does not answer


def wait_until(condition: Callable[[], Value], seconds: float, poll_seconds: float = POLL_SECONDS) -> Value:
    """Poll until the condition is true or the time is over; returns its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(poll_seconds)
    return value


class ProcessEntry(NamedTuple):
    """A process; the properties of one that is gone are empty or 0."""

    pid: int

    @property
    def command(self) -> bytes:
        """Its command line."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes()
        return b""

    @property
    def parent(self) -> int:
        """Process id of its parent."""
        return int(self._field(PARENT) or 0)

    @property
    def session(self) -> int:
        """Its session."""
        return int(self._field(SESSION) or 0)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal such as SIGSTOP has stopped it."""
        return self._field(STATE) in ("T", "t")

    @property
    def is_dead(self) -> bool:
        """Whether it is gone or a zombie."""
        return self._field(STATE) in ("", "Z", "X")

    def _field(self, number: int) -> str:
        with suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[number]
        return ""


@contextmanager
def process_descriptor(pid: int, session: int) -> Iterator[int | None]:
    """A descriptor of a process; None if the process is not in that session, since the kernel reuses process ids."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if ProcessEntry(pid).session == session else None
    finally:
        os.close(descriptor)


def send_signal(pid: int, session: int, number: signal.Signals) -> bool:
    """Send a signal to a process of a session; returns whether the process exists."""
    with process_descriptor(pid, session) as descriptor, suppress(OSError):
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)
            return True
    return False


def is_gone(pid: int, session: int) -> bool:
    """Whether a process of a session has ended."""
    with process_descriptor(pid, session) as descriptor:
        if descriptor is None:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))


def session_members(session: int) -> list[int]:
    """Process ids of a session, zombies excluded."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (entry := ProcessEntry(pid)).session == session and not entry.is_dead]


def kill_session(session: int) -> list[int]:
    """Kill every process of a session, stopped ones too; returns those that survive."""

    def is_empty() -> bool:
        pids = session_members(session)
        for pid in pids:
            send_signal(pid, session, signal.SIGKILL)
        return not pids

    return [] if wait_until(is_empty, KILL_SECONDS) else session_members(session)

"""Processes of this machine by what /proc says of them, and a session of them ended as one."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

STATE, PARENT, SESSION = 0, 1, 3  # of the fields after the command's name in /proc/PID/stat
KILL_SECONDS = 30.0  # a process that does not go by then waits for a device that does not answer
LOOK_SECONDS = 0.02


class ProcessEntry(NamedTuple):
    """A process; what is asked of one that is gone is empty or 0."""

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
        """Whether a signal such as SIGSTOP has halted it."""
        return self._field(STATE) in ("T", "t")

    @property
    def is_dead(self) -> bool:
        """Whether it is gone, or just waits for its parent to hear of that."""
        return self._field(STATE) in ("", "Z", "X")

    def _field(self, number: int) -> str:
        with suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[number]
        return ""


@contextmanager
def held(pid: int, session: int) -> Iterator[int | None]:
    """A descriptor of a process, None unless it is of that session: its number may be another's by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if ProcessEntry(pid).session == session else None
    finally:
        os.close(descriptor)


def send(pid: int, session: int, number: signal.Signals) -> bool:
    """Signal a process of a session; whether it was there."""
    with held(pid, session) as descriptor, suppress(OSError):
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)
            return True
    return False


def is_gone(pid: int, session: int) -> bool:
    """Whether a process of a session has ended."""
    with held(pid, session) as descriptor:
        if descriptor is None:
            return True
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        return bool(waiting.poll(0))


def members(session: int) -> list[int]:
    """Process ids of a session, without its dead."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (entry := ProcessEntry(pid)).session == session and not entry.is_dead]


def kill_session(session: int) -> list[int]:
    """End every process of a session, stopped ones too; returns those that do not go."""
    deadline = time.monotonic() + KILL_SECONDS
    while left := members(session):
        for pid in left:
            send(pid, session, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(LOOK_SECONDS)
    return []

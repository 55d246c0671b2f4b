"""Ports for several listeners side by side."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

LOWEST, HIGHEST = 20000, 32000  # below those that Linux gives to whoever asks for any


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on just now."""
    while True:
        first = random.randrange(LOWEST, HIGHEST)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first

"""Consecutive ports for several listeners."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

LOWEST, HIGHEST = 20000, 32000  # below Linux's range of ephemeral ports


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that no process listens on at the moment."""
    while True:
        first = random.randrange(LOWEST, HIGHEST)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first

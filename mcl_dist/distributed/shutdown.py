"""Leaving before the end: one rank is asked to, all ranks agree, save at the same step and go.

Nothing is printed while a signal is handled: where the terminal has gone, that would end the process instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_AT_ONCE = 130  # what shells report for a program that Ctrl-C ended


def leave_at_once() -> NoReturn:
    """End this process, whatever it is at."""
    os._exit(EXIT_AT_ONCE)


class StopRequest:
    """Whether this process was asked to stop, and by what.

    Args:
        at_once: called at the second Ctrl-C, from the signal's handler.
    """

    def __init__(self, at_once: Callable[[], None] = leave_at_once) -> None:
        self.reason: str | None = None
        self._at_once = at_once
        self._interrupts = 0

    @property
    def is_asked(self) -> bool:
        """Whether anything asked this process."""
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Stop when it is possible without loss; the first reason stays."""
        if self.reason is None:
            self.reason = reason

    def heed_signals(self) -> None:
        """Take SIGTERM, SIGINT, SIGUSR1 and SIGHUP for requests, and a second Ctrl-C for a wish to end at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._at_once()
        self.ask(signal.Signals(number).name)

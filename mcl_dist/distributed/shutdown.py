"""Stopping before the end: one rank is asked to stop, all ranks agree, save at the same step and exit.

Signal handlers print nothing: without a terminal, printing would kill the process.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


def exit_now() -> NoReturn:
    """End this process without any cleanup."""
    os._exit(EXIT_INTERRUPTED)


class StopRequest:
    """Whether this process was asked to stop, and the reason.

    Args:
        on_second_interrupt: called at the second Ctrl-C, in the signal handler.
    """

    def __init__(self, on_second_interrupt: Callable[[], None] = exit_now) -> None:
        self.reason: str | None = None
        self._on_second_interrupt = on_second_interrupt
        self._interrupts = 0

    @property
    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Request a stop at the next point without loss; the first reason is kept."""
        if self.reason is None:
            self.reason = reason

    def handle_signals(self) -> None:
        """Stop on SIGTERM, SIGINT, SIGUSR1 and SIGHUP; call `on_second_interrupt` on a second Ctrl-C."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._on_second_interrupt()
        self.request(signal.Signals(number).name)

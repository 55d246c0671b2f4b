"""One progress line: rewritten in place on a terminal, printed as plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.terminal.units import format_duration

Item = TypeVar("Item")
REDRAW_SECONDS = 0.1  # between redraws on a terminal
PLAIN_SECONDS = 30.0  # between plain lines


class ProgressLine:
    """The current status of a loop in one line, which disappears from a terminal at the end; threads may share it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        console = Console(file=self._stream, force_terminal=self._stream.isatty(), highlight=False)
        if console.is_terminal and console.is_interactive:  # not a dumb terminal
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
        self._interval = REDRAW_SECONDS if self._live else PLAIN_SECONDS
        self._start = time.monotonic()
        self._last_shown = -REDRAW_SECONDS if self._live else 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the line was created."""
        return time.monotonic() - self._start

    def update(self, status: str, *, now: bool = False) -> None:
        """Show the status, unless the last one was shown less than an interval ago and `now` is not set."""
        seconds = self.seconds
        if not now and seconds - self._last_shown < self._interval:
            return
        self._last_shown = seconds
        if self._live is None:
            print(status, file=self._stream, flush=True)
            return
        self._live.start()
        self._live.update(Text(status, no_wrap=True, overflow="ellipsis"), refresh=True)

    def log(self, line: str) -> None:
        """Print a line that stays, above the progress line."""
        if self._live is None:
            print(line, file=self._stream, flush=True)
        else:
            self._live.console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Remove the progress line from a terminal."""
        if self._live is not None:
            self._live.stop()


def track(items: Iterable[Item], total: int, what: str, stream: TextIO | None = None) -> Iterator[Item]:
    """Yield the items and show the progress of `what` on `stream` (by default standard error)."""
    line = ProgressLine(stream)
    try:
        line.update(f"{what} …", now=True)
        for done, item in enumerate(items):
            left = round(line.seconds / done * (total - done)) if done else None
            line.update(f"{what}  {done / total:.0%}  left {format_duration(left)}")
            yield item
        line.log(f"{what}: {line.seconds:.1f} s")
    finally:
        line.close()

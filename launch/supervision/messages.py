"""Messages of a command to its user."""

import sys
from contextlib import suppress
from typing import TextIO


def print_safely(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print at once; ignore a terminal that is closed, so that the run continues without it."""
    with suppress(OSError):
        print(text, end=end, file=stream, flush=True)


def log(message: str) -> None:
    """Print one line to standard error."""
    print_safely(f"mcl: {message}", sys.stderr)

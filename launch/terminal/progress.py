"""Progress of a loop: one line rewritten when a person watches, a line at its start and end when not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")
REDRAW_SECONDS = 0.1


def watched(items: Iterable[Item], total: int, what: str, stream: TextIO | None = None) -> Iterator[Item]:
    """Yield the items, telling `stream` (standard error) of `what` and how far it is."""
    stream = stream or sys.stderr
    rewrites = stream.isatty()
    line_start = "\r\033[K" if rewrites else ""
    start = drawn = time.monotonic()
    if not rewrites:
        print(f"{what} …", file=stream, flush=True)
    for done, item in enumerate(items):
        now = time.monotonic()
        if rewrites and now - drawn >= REDRAW_SECONDS:
            drawn = now
            left = (now - start) / done * (total - done) if done else 0
            print(f"{line_start}{what}  {done / total:.0%}  left {left:.0f} s", file=stream, end="", flush=True)
        yield item
    print(f"{line_start}{what}: {time.monotonic() - start:.1f} s", file=stream, flush=True)

"""Sparklines of block characters."""

from collections.abc import Sequence
from itertools import pairwise

LEVELS = " ▁▂▃▄▅▆▇█"
EIGHTHS = len(LEVELS) - 1


def sparkline(values: Sequence[float | None], width: int, height: int = 1) -> list[str]:
    """Draw values as `height` lines of `width` characters, top line first; a missing value leaves its column empty.

    If there are more values than columns, each column shows a mean. The smallest value is drawn as the lowest block.
    """
    columns = _columns(values, width)
    known = [value for value in columns if value is not None]
    if not known:
        return [" " * width] * height
    low, high = min(known), max(known)
    top = EIGHTHS * height - 1
    heights = [0 if value is None else 1 + round(top * _fraction(value, low, high)) for value in columns]
    rows = range(height - 1, -1, -1)
    return ["".join(LEVELS[max(0, min(EIGHTHS, eighths - EIGHTHS * row))] for eighths in heights) for row in rows]


def _columns(values: Sequence[float | None], width: int) -> list[float | None]:
    num_values = len(values)
    if num_values <= width:
        return [*values, *[None] * (width - num_values)]
    edges = [column * num_values // width for column in range(width + 1)]
    return [_mean(values[start:end]) for start, end in pairwise(edges)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _fraction(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5

"""Figures of every step in bounded memory: the newest as they were, all of them as means over more and more steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

MOST_POINTS = 300  # of the whole run: about as many as a chart has pixels to tell apart
NUM_RECENT = 120
DIGITS = 6


class Columns(TypedDict):
    """Points in order; a value that a point lacks, or that is not finite, is none."""

    step: list[int]
    time: list[float | None]
    values: dict[str, list[float | None]]


@dataclass
class _Point:
    """Some steps in a row: the last one's number and time, and what their finite values add up to."""

    step: int
    time: float | None
    num_steps: int = 1
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, later: _Point) -> None:
        """Take in the steps that come next."""
        self.step, self.time = later.step, later.time
        self.num_steps += later.num_steps
        for name, (value, count) in later.sums.items():
            own_value, own_count = self.sums.get(name, (0.0, 0))
            self.sums[name] = own_value + value, own_count + count

    def mean(self, name: str) -> float | None:
        """Mean of the steps that have a finite value."""
        value, count = self.sums.get(name, (0.0, 0))
        return float(f"{value / count:.{DIGITS}g}") if count else None


class Curves:
    """The course of a run, a step at a time; what a step costs does not grow with the run."""

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._recent: deque[_Point] = deque(maxlen=NUM_RECENT)
        self._width = 1  # steps to a point

    def append(self, step: int, time: float | None, values: Mapping[str, Any]) -> None:
        """Add a step; steps after it, which a run that went back has left behind, are forgotten."""
        if self._recent and step <= self._recent[-1].step:
            self.rewind(step)
        sums = {name: (float(value), 1) for name, value in values.items() if _is_finite(value)}
        self._recent.append(_Point(step, time, 1, sums))
        newest = _Point(step, time, 1, dict(sums))
        if self._points and self._points[-1].num_steps < self._width:
            self._points[-1].add(newest)
            return
        self._points.append(newest)
        if len(self._points) > MOST_POINTS:
            self._halve()

    def rewind(self, step: int) -> None:
        """Forget this step and those after it."""
        self._recent = deque((point for point in self._recent if point.step < step), maxlen=NUM_RECENT)
        while self._points and self._points[-1].step >= step:
            self._points.pop()

    def whole(self) -> Columns:
        """All steps, in at most `MOST_POINTS` points."""
        return _columns(self._points)

    def recent(self) -> Columns:
        """The newest steps, each a point."""
        return _columns(self._recent)

    def _halve(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=False)
        odd = self._points[-1:] if len(self._points) % 2 else []
        merged = []
        for point, later in pairs:
            point.add(later)
            merged.append(point)
        self._points = merged + odd
        self._width *= 2


def _columns(points: Iterable[_Point]) -> Columns:
    points = list(points)
    names = dict.fromkeys(name for point in points for name in point.sums)
    return Columns(
        step=[point.step for point in points],
        time=[point.time for point in points],
        values={name: [point.mean(name) for point in points] for name in names},
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""Values of every step in bounded memory: the newest steps exactly, all steps as means over growing intervals."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

MOST_POINTS = 300  # of the whole run: about the horizontal resolution of a chart
NUM_RECENT = 120
DIGITS = 6


class Columns(TypedDict):
    """Points in step order; a missing or non-finite value is None."""

    step: list[int]
    time: list[float | None]
    values: dict[str, list[float | None]]


@dataclass
class _Point:
    """Consecutive steps: number and time of the last one, and (sum, count) of their finite values."""

    step: int
    time: float | None
    num_steps: int = 1
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, following: _Point) -> None:
        """Extend this point by the steps that follow it."""
        self.step, self.time = following.step, following.time
        self.num_steps += following.num_steps
        for name, (value, count) in following.sums.items():
            own_value, own_count = self.sums.get(name, (0.0, 0))
            self.sums[name] = own_value + value, own_count + count

    def mean(self, name: str) -> float | None:
        """Mean over the steps with a finite value."""
        value, count = self.sums.get(name, (0.0, 0))
        return float(f"{value / count:.{DIGITS}g}") if count else None


class Curves:
    """Values over the steps of a run; the cost of a step does not grow with the run."""

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._recent: deque[_Point] = deque(maxlen=NUM_RECENT)
        self._steps_per_point = 1

    def append(self, step: int, time: float | None, values: Mapping[str, Any]) -> None:
        """Add a step; drops later steps, which remain from before a rollback."""
        if self._recent and step <= self._recent[-1].step:
            self.rewind(step)
        sums = {name: (float(value), 1) for name, value in values.items() if _is_finite(value)}
        self._recent.append(_Point(step, time, 1, sums))
        newest = _Point(step, time, 1, dict(sums))
        if self._points and self._points[-1].num_steps < self._steps_per_point:
            self._points[-1].add(newest)
            return
        self._points.append(newest)
        if len(self._points) > MOST_POINTS:
            self._halve()

    def rewind(self, step: int) -> None:
        """Drop this step and all later ones."""
        self._recent = deque((point for point in self._recent if point.step < step), maxlen=NUM_RECENT)
        while self._points and self._points[-1].step >= step:
            self._points.pop()

    def whole(self) -> Columns:
        """All steps, in at most `MOST_POINTS` points."""
        return _columns(self._points)

    def recent(self) -> Columns:
        """The newest steps, one point each."""
        return _columns(self._recent)

    def _halve(self) -> None:
        pairs = zip(self._points[::2], self._points[1::2], strict=False)
        odd = self._points[-1:] if len(self._points) % 2 else []
        merged = []
        for point, following in pairs:
            point.add(following)
            merged.append(point)
        self._points = merged + odd
        self._steps_per_point *= 2


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

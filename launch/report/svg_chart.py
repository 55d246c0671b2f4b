"""Lines over the steps of a run as SVG from Python: gaps where there is no value, and a table of what the lines say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from launch.report.html import Markup, joined, tag
from launch.terminal.units import number

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 22, 40
NUM_TICKS, STEP_TICKS = 4, 6
NUM_COLOURS = 6
FLAT = 0.1  # of its value to both sides of a line that never moves
STYLE = """
:root{--c0:#0072b2;--c1:#d55e00;--c2:#007a5a;--c3:#a8417f;--c4:#8a6d00;--c5:#3f6fb5}
@media(prefers-color-scheme:dark){:root{--c0:#56b4e9;--c1:#ff9d5c;--c2:#3ddbaa;--c3:#f0a0cc;--c4:#f0e442;--c5:#a8c4ff}}
.chart h3{margin-top:0}.chart td{white-space:nowrap}
.chart svg{display:block;width:100%;height:auto}.chart text{font-size:12px;fill:var(--soft)}
.chart .grid-line{stroke:var(--line)}.chart path{fill:none;stroke-width:1.8;stroke-linecap:round}
.c0{stroke:var(--c0);background:var(--c0)}.c1{stroke:var(--c1);background:var(--c1)}
.c2{stroke:var(--c2);background:var(--c2)}.c3{stroke:var(--c3);background:var(--c3)}
.c4{stroke:var(--c4);background:var(--c4)}.c5{stroke:var(--c5);background:var(--c5)}
.chart table{width:100%;font-size:.85rem}.chart i{display:inline-block;width:.7rem;height:.7rem;margin-right:.35rem;
border-radius:.15rem}
@media(max-width:36rem){.card>.grid>.chart{border:0;padding:0}
.chart text{font-size:15px}.chart th,.chart td{padding-right:.45rem}}
"""


class Curve(NamedTuple):
    """A line: a value for each step, none where there is none."""

    name: str
    values: Sequence[float | None]


def chart(title: str, unit: str, steps: Sequence[int], curves: Sequence[Curve], span: tuple[int, int]) -> Markup:
    """A card with the lines, and last, first, lowest and highest value of each.

    Args:
        title, unit: of the values.
        steps: of the lines' values, ascending.
        curves: with as many values each.
        span: first and last step of the axis.
    """
    known = [value for curve in curves for value in curve.values if value is not None]
    heading = tag("h3", f"{title} ({unit})")
    if not known:
        return tag("section", heading, tag("p", "No value yet.", class_="soft"), class_="card chart")
    return tag(
        "section", heading, _drawing(title, unit, steps, curves, span, known), _table(curves), class_="card chart"
    )


def ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """About `count` round numbers from `low` or below to `high` or above."""
    if low == high:
        low, high = low - FLAT * (abs(low) or 1), high + FLAT * (abs(high) or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _drawing(
    title: str, unit: str, steps: Sequence[int], curves: Sequence[Curve], span: tuple[int, int], known: Sequence[float]
) -> Markup:
    up, along = ticks(min(known), max(known)), [at for at in ticks(*span, STEP_TICKS) if span[0] <= at <= span[1]]

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - span[0]) / max(1, span[1] - span[0])

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - up[0]) / (up[-1] - up[0])

    lines = (
        tag(
            "path",
            d=" ".join(_path([(across(step), value) for step, value in zip(steps, curve.values, strict=True)], down)),
            class_=f"c{index % NUM_COLOURS}",
            data_name=curve.name,
        )
        for index, curve in enumerate(curves)
    )
    return tag(
        "svg",
        *(_row(value, down(value)) for value in up),
        *(_column(step, across(step)) for step in along),
        tag("text", unit, x=LEFT, y=12),
        tag("text", "steps", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} in {unit}, by step",
    )


def _row(value: float, y: float) -> Markup:
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid-line")
    return joined(line, tag("text", _round(value), x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))


def _column(step: float, x: float) -> Markup:
    bottom = HEIGHT - BOTTOM
    line = tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 5, class_="grid-line")
    return joined(line, tag("text", f"{step:,.0f}", x=f"{x:.1f}", y=bottom + 19, text_anchor="middle"))


def _path(points: Sequence[tuple[float, float | None]], down: Callable[[float], float]) -> Iterator[str]:
    """A point between two gaps is a line of hardly any length, and so drawn as a dot."""
    is_drawing = False
    for x, value in points:
        if value is not None:
            yield f"{'L' if is_drawing else 'M'}{x:.1f} {down(value):.1f}" + ("" if is_drawing else " h.01")
        is_drawing = value is not None


def _table(curves: Sequence[Curve]) -> Markup:
    head = tag("tr", *(tag("th", word) for word in ("", "last", "first", "lowest", "highest")))
    return tag(
        "div", tag("table", head, *(_figures(index, curve) for index, curve in enumerate(curves))), class_="scroll"
    )


def _figures(index: int, curve: Curve) -> Markup:
    known = [value for value in curve.values if value is not None]
    figures = (known[-1], known[0], min(known), max(known)) if known else ()
    name = joined(tag("i", class_=f"c{index % NUM_COLOURS}"), curve.name)
    return tag("tr", tag("td", name), *(tag("td", number(value)) for value in figures or [None] * 4))


def _round(value: float) -> str:
    """A tick, which is round already."""
    return f"{value:,.6g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2g}"

"""Line charts over training steps as SVG, with gaps for missing values and a table of key values."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from launch.report.html import SafeHtml, fragment, tag
from launch.terminal.units import format_number

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 22, 40
NUM_TICKS, STEP_TICKS = 4, 6
NUM_COLOURS = 6
FLAT = 0.1  # margin around a constant curve, as a fraction of its value
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
    """A named curve with one value per step; None is a gap."""

    name: str
    values: Sequence[float | None]


def chart(title: str, unit: str, steps: Sequence[int], curves: Sequence[Curve], span: tuple[int, int]) -> SafeHtml:
    """A card with the curves and a table of the last, first, lowest and highest value of each.

    `steps` ascend and have one value of each curve; `span` is the first and last step of the axis.
    """
    known = [value for curve in curves for value in curve.values if value is not None]
    heading = f"{title} ({unit})" if unit else title
    if not known:
        return tag("section", tag("h3", heading), tag("p", "No value yet.", class_="soft"), class_="card chart")
    svg = _svg(heading, unit, steps, curves, span, ticks(min(known), max(known)))
    return tag("section", tag("h3", heading), svg, _table(curves), class_="card chart")


def ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """About `count` round numbers that cover the range from `low` to `high`."""
    if low == high:
        low, high = low - FLAT * (abs(low) or 1), high + FLAT * (abs(high) or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _svg(
    heading: str, unit: str, steps: Sequence[int], curves: Sequence[Curve], span: tuple[int, int], y_ticks: list[float]
) -> SafeHtml:
    x_ticks = [step for step in ticks(*span, STEP_TICKS) if span[0] <= step <= span[1]]

    def to_x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - span[0]) / max(1, span[1] - span[0])

    def to_y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    xs = [to_x(step) for step in steps]
    paths = (" ".join(_path(zip(xs, curve.values, strict=True), to_y)) for curve in curves)
    lines = (
        tag("path", d=path, class_=f"c{index % NUM_COLOURS}", data_name=curve.name)
        for index, (path, curve) in enumerate(zip(paths, curves, strict=True))
    )
    return tag(
        "svg",
        *(_y_tick(value, to_y(value)) for value in y_ticks),
        *(_x_tick(step, to_x(step)) for step in x_ticks),
        tag("text", unit, x=LEFT, y=12),
        tag("text", "steps", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"),
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{heading} by step",
    )


def _y_tick(value: float, y: float) -> SafeHtml:
    label = f"{value:,.6g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2g}"
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid-line")
    return fragment(line, tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))


def _x_tick(step: float, x: float) -> SafeHtml:
    bottom = HEIGHT - BOTTOM
    line = tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 5, class_="grid-line")
    return fragment(line, tag("text", f"{step:,.0f}", x=f"{x:.1f}", y=bottom + 19, text_anchor="middle"))


def _path(points: Iterable[tuple[float, float | None]], to_y: Callable[[float], float]) -> Iterator[str]:
    """SVG path commands; a point between two gaps is drawn as a dot: a line of length 0.01."""
    is_drawing = False
    for x, value in points:
        if value is not None:
            yield f"{'L' if is_drawing else 'M'}{x:.1f} {to_y(value):.1f}" + ("" if is_drawing else " h.01")
        is_drawing = value is not None


def _table(curves: Sequence[Curve]) -> SafeHtml:
    head = tag("tr", *(tag("th", name) for name in ("", "last", "first", "lowest", "highest")))
    rows = (_table_row(index, curve) for index, curve in enumerate(curves))
    return tag("div", tag("table", head, *rows), class_="scroll")


def _table_row(index: int, curve: Curve) -> SafeHtml:
    known = [value for value in curve.values if value is not None]
    values = (known[-1], known[0], min(known), max(known)) if known else ()
    name = fragment(tag("i", class_=f"c{index % NUM_COLOURS}"), curve.name)
    return tag("tr", tag("td", name), *(tag("td", format_number(value)) for value in values or [None] * 4))

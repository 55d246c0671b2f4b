"""The page of `mcl bench method`: what its runs went through, variant beside variant."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from launch.report.document import document
from launch.report.html import Markup, tag
from launch.report.svg_chart import STYLE, Curve, chart
from monitoring.history.curves import Columns
from monitoring.history.run_folder import RunFolder

NUM_POINTS = 50  # of a line: what is left of a step's noise then hides no difference
# Title, unit, name of the figure and what it is multiplied by.
CHARTS = (
    ("Inter loss", "nats", "loss_inter", 1.0),
    ("Intra loss", "nats", "loss_intra", 1.0),
    ("Alignment map and its target", "cosine", "similarity_alignment", 1.0),
)
ON_THE_WAY = ("kNN of held-out videos", "% right", "top1", 100.0)


def page(scene: str, runs: Mapping[str, Sequence[Path]], results: str) -> str:
    """The results and, of each variant, the course of its runs, the mean over seeds.

    Args:
        scene: what the videos show.
        runs: run folders by variant.
        results: the comparison as text.

    Raises:
        UserError: there is no such run.
    """
    views = {variant: [RunFolder(folder).view() for folder in folders] for variant, folders in runs.items()}
    steps = {variant: [view["whole"] for view in found] for variant, found in views.items()}
    last = max((step for found in steps.values() for columns in found for step in columns["step"]), default=0)
    ends = sorted({-(-last * point // NUM_POINTS) for point in range(1, NUM_POINTS + 1)})
    drawn = [_chart(*each, steps, ends) for each in CHARTS]
    evaluations = {variant: [view["evaluations"] for view in found] for variant, found in views.items()}
    if evaluated := sorted({step for found in evaluations.values() for columns in found for step in columns["step"]}):
        drawn.append(_chart(*ON_THE_WAY, evaluations, evaluated))
    return document(
        f"What motion adds: {scene}",
        tag("section", tag("h2", "Top-1 at the end"), tag("pre", results), class_="card"),
        tag("div", *drawn, class_="grid"),
        style=STYLE,
    )


def _chart(
    title: str, unit: str, name: str, scale: float, runs: Mapping[str, Sequence[Columns]], ends: Sequence[int]
) -> Markup:
    curves = [Curve(variant, _means(found, name, scale, ends)) for variant, found in runs.items()]
    return chart(title, unit, ends, curves, (ends[0], ends[-1]))


def _means(runs: Sequence[Columns], name: str, scale: float, ends: Sequence[int]) -> list[float | None]:
    """Over all runs, of the steps up to each end that are beyond the end before."""
    found: list[list[float]] = [[] for _ in ends]
    for columns in runs:
        for step, value in zip(columns["step"], columns["values"].get(name, ()), strict=False):
            if value is not None:
                found[bisect_left(ends, step)].append(scale * value)
    return [mean(values) if values else None for values in found]

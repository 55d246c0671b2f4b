"""The page of `mcl bench method`: curves of its runs, by variant."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from launch.report.html import SafeHtml, html_page, tag
from launch.report.svg_chart import STYLE, Curve, chart
from monitoring.history.curves import Columns
from monitoring.history.run_folder import RunFolder

NUM_POINTS = 50  # per curve: averages out the noise of single steps
# Title, unit, name of the value and its factor.
CHARTS = (
    ("Inter loss", "nats", "loss_inter", 1.0),
    ("Intra loss", "nats", "loss_intra", 1.0),
    ("Alignment map and its target", "cosine", "similarity_alignment", 1.0),
)
ONLINE_KNN = ("kNN of held-out videos", "% right", "top1", 100.0)


def ablation_page(scene: str, runs: Mapping[str, Sequence[Path]], results: str) -> str:
    """The results, which are text, and curves of each variant, as means over its run folders, one for each seed.

    Raises:
        UserError: a run folder does not exist or is empty.
    """
    views = {variant: [RunFolder(folder).view() for folder in folders] for variant, folders in runs.items()}
    steps = {variant: [view["whole"] for view in of_variant] for variant, of_variant in views.items()}
    last = max((step for columns in steps.values() for each in columns for step in each["step"]), default=0)
    last_steps = sorted({-(-last * point // NUM_POINTS) for point in range(1, NUM_POINTS + 1)})
    charts = [_chart(*each, steps, last_steps) for each in CHARTS]
    evaluations = {variant: [view["evaluations"] for view in of_variant] for variant, of_variant in views.items()}
    if evaluated := sorted({step for columns in evaluations.values() for each in columns for step in each["step"]}):
        charts.append(_chart(*ONLINE_KNN, evaluations, evaluated))
    return html_page(
        f"What motion adds: {scene}",
        tag("section", tag("h2", "Top-1 at the end"), tag("pre", results), class_="card"),
        tag("div", *charts, class_="grid"),
        style=STYLE,
    )


def _chart(
    title: str, unit: str, name: str, scale: float, runs: Mapping[str, Sequence[Columns]], last_steps: Sequence[int]
) -> SafeHtml:
    curves = [Curve(variant, _means(columns, name, scale, last_steps)) for variant, columns in runs.items()]
    return chart(title, unit, last_steps, curves, (last_steps[0], last_steps[-1]))


def _means(runs: Sequence[Columns], name: str, scale: float, last_steps: Sequence[int]) -> list[float | None]:
    """Means over all runs of the steps between each end and the end before it."""
    found: list[list[float]] = [[] for _ in last_steps]
    for columns in runs:
        for step, value in zip(columns["step"], columns["values"].get(name, ()), strict=False):
            if value is not None:
                found[bisect_left(last_steps, step)].append(scale * value)
    return [mean(values) if values else None for values in found]

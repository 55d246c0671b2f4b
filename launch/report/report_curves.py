"""The course of a run on its report."""

from __future__ import annotations

from launch.report.html import Markup, tag
from launch.report.svg_chart import Curve, chart
from mcl_dist.errors import UserError
from mcl_dist.run_log.listeners import MEASURES
from monitoring.history.run_view import RunView

# Title, unit, prefix of the figures' names, what they are multiplied by, and what a figure with no more name is called.
CHARTS = (
    ("Losses", "nats", "loss", 1.0, "total"),
    ("Learning rate", "per step", "learning_rate", 1.0, "rate"),
    ("Throughput", "videos/s", "videos_per_second", 1.0, "videos/s"),
    ("Waiting for data", "% of a step", "data_wait_ratio", 100.0, "waiting"),
    ("Similarities", "cosine", "similarity", 1.0, ""),
    ("Gradient norm", "2-norm", "gradient_norm", 1.0, "norm"),
)


def curves(view: RunView) -> Markup:
    """Charts of all that a run's metrics tell.

    Raises:
        UserError: there is no step yet.
    """
    steps, values = view["whole"]["step"], view["whole"]["values"]
    if not steps:
        raise UserError("the run has not finished a step yet")
    span = (steps[0], steps[-1])
    drawn = [
        chart(title, unit, steps, _named(values, prefix, scale, whole), span)
        for title, unit, prefix, scale, whole in CHARTS
    ]
    return tag("div", *drawn, _accuracies(view, span), class_="grid")


def _accuracies(view: RunView, span: tuple[int, int]) -> Markup:
    title, unit = "kNN of held-out videos", "% right"
    evaluations = view["evaluations"]
    if not evaluations["step"]:
        why = "Not evaluated on the way: evaluate.every and evaluate.test do that."
        return tag("section", tag("h3", f"{title} ({unit})"), tag("p", why, class_="absent"), class_="card")
    lines = [Curve(name, _scaled(evaluations["values"][key], 100.0)) for key, name in MEASURES.items()]
    return chart(title, unit, evaluations["step"], lines, span)


def _named(values: dict[str, list[float | None]], prefix: str, scale: float, whole: str) -> list[Curve]:
    return [
        Curve(name.removeprefix(prefix).removeprefix("_") or whole, _scaled(column, scale))
        for name, column in values.items()
        if name.startswith(prefix)
    ]


def _scaled(values: list[float | None], scale: float) -> list[float | None]:
    return [None if value is None else scale * value for value in values]

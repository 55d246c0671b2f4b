"""Section "Learning curves" of a run's report."""

from launch.report.html import SafeHtml, tag
from launch.report.svg_chart import Curve, chart
from mcl_dist.errors import UserError
from mcl_dist.run_log.listeners import SCORE_LABELS
from monitoring.history.run_view import RunView

# Title, unit, prefix of the value names, scale, and the name of a value that is named by the prefix alone.
CHARTS = (
    ("Losses", "nats", "loss", 1.0, "total"),
    ("Learning rate", "", "learning_rate", 1.0, "learning rate"),
    ("Throughput", "videos/s", "videos_per_second", 1.0, "videos/s"),
    ("Data wait", "% of step time", "data_wait_ratio", 100.0, "data wait"),
    ("Similarities", "cosine", "similarity", 1.0, ""),
    ("Gradient norm", "L2", "gradient_norm", 1.0, "gradient norm"),
)


def curves_section(view: RunView) -> SafeHtml:
    """Charts of a run's metrics; raises UserError if the run has no finished step."""
    steps, values = view["whole"]["step"], view["whole"]["values"]
    if not steps:
        raise UserError("the run has not finished a step yet")
    span = (steps[0], steps[-1])
    charts = [
        chart(title, unit, steps, _curves(values, prefix, scale, default), span)
        for title, unit, prefix, scale, default in CHARTS
    ]
    return tag("div", *charts, _online_knn(view, span), class_="grid")


def _online_knn(view: RunView, span: tuple[int, int]) -> SafeHtml:
    title, unit = "Online kNN", "% accuracy"
    evaluations = view["evaluations"]
    if not evaluations["step"]:
        reason = "No online evaluation; set evaluate.every and evaluate.test."
        return tag("section", tag("h3", f"{title} ({unit})"), tag("p", reason, class_="absent"), class_="card")
    curves = [Curve(name, _scaled(evaluations["values"][key], 100.0)) for key, name in SCORE_LABELS.items()]
    return chart(title, unit, evaluations["step"], curves, span)


def _curves(values: dict[str, list[float | None]], prefix: str, scale: float, default: str) -> list[Curve]:
    return [
        Curve(name.removeprefix(prefix).removeprefix("_") or default, _scaled(column, scale))
        for name, column in values.items()
        if name.startswith(prefix)
    ]


def _scaled(values: list[float | None], scale: float) -> list[float | None]:
    return [None if value is None else scale * value for value in values]

"""Queries of the dashboards and rules, parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.support.paths import REPOSITORY

MONITORING = REPOSITORY / "monitoring"
DASHBOARD_FILES = sorted(MONITORING.glob("grafana/dashboards/*.json"))
DASHBOARD_JSON = {file.stem: json.loads(file.read_text()) for file in DASHBOARD_FILES}
INTERVAL = "$__rate_interval"


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a dashboard, without its rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Name and PromQL of every query of every panel."""
    for name, dashboard in DASHBOARD_JSON.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name} / {panel['title']} / {target['legendFormat']}", target["expr"]


def rules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and definition of every rule."""
    for file in ("recording.yml", "alerts.yml"):
        for group in yaml.safe_load((MONITORING / "prometheus" / file).read_text())["groups"]:
            for rule in group["rules"]:
                yield rule.get("alert") or rule["record"], rule


def selectors(expression: str) -> list[tuple[str, str, dict[str, str], bool]]:
    """Every selector of a query: metric, enclosing function, label matchers, and whether it has a range.

    Raises:
        ValueError: the query is not valid PromQL.
    """
    return list(_selectors(promql_parser.parse(expression.replace(INTERVAL, "5m")), ""))


def _selectors(node: Any, function: str) -> Iterator[tuple[str, str, dict[str, str], bool]]:
    if isinstance(node, promql_parser.MatrixSelector | promql_parser.VectorSelector):
        is_range = isinstance(node, promql_parser.MatrixSelector)
        selector = node.vector_selector if is_range else node
        yield selector.name, function, {m.name: m.value for m in selector.matchers.matchers}, is_range
    for name in ("expr", "lhs", "rhs"):
        if hasattr(node, name):
            yield from _selectors(getattr(node, name), function)
    for argument in getattr(node, "args", []):
        yield from _selectors(argument, node.func.name)


def operands(expression: str) -> list[str]:
    """The sides of an alert's comparisons that contain selectors.

    Raises:
        ValueError: the query is not valid PromQL.
    """
    return list(_comparison_sides(promql_parser.parse(expression)))


def _comparison_sides(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _comparison_sides(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in ("and", "or", "unless"):
        yield from _comparison_sides(node.lhs)
        yield from _comparison_sides(node.rhs)
    else:
        yield from (side.prettify() for side in (node.lhs, node.rhs) if list(_selectors(side, "")))

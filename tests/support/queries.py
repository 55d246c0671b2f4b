"""The queries of the dashboards and rules, taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.support.paths import REPOSITORY

MONITORING = REPOSITORY / "monitoring"
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted(MONITORING.glob("grafana/dashboards/*.json"))}
INTERVAL = "$__rate_interval"


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a dashboard but the titles of its rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Where it stands and PromQL, of every query of every panel."""
    for name, board in BOARDS.items():
        for panel in panels(board):
            for target in panel["targets"]:
                yield f"{name} / {panel['title']} / {target['legendFormat']}", target["expr"]


def rules() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and all of every rule."""
    for file in ("recording.yml", "alerts.yml"):
        for group in yaml.safe_load((MONITORING / "prometheus" / file).read_text())["groups"]:
            for rule in group["rules"]:
                yield rule.get("alert") or rule["record"], rule


def selectors(expression: str) -> list[tuple[str, str, dict[str, str], bool]]:
    """Every selector of a query: metric, the function around it, its matchers, and whether it has a range.

    Raises:
        ValueError: it is no PromQL.
    """
    return list(_below(promql_parser.parse(expression.replace(INTERVAL, "5m")), ""))


def _below(node: Any, function: str) -> Iterator[tuple[str, str, dict[str, str], bool]]:
    if isinstance(node, promql_parser.MatrixSelector | promql_parser.VectorSelector):
        is_range = isinstance(node, promql_parser.MatrixSelector)
        selector = node.vector_selector if is_range else node
        yield selector.name, function, {m.name: m.value for m in selector.matchers.matchers}, is_range
    for name in ("expr", "lhs", "rhs"):
        if hasattr(node, name):
            yield from _below(getattr(node, name), function)
    for argument in getattr(node, "args", []):
        yield from _below(argument, node.func.name)


def operands(expression: str) -> list[str]:
    """What an alert holds against its limits: the sides of its comparisons that are looked up.

    Raises:
        ValueError: it is no PromQL.
    """
    return list(_compared(promql_parser.parse(expression)))


def _compared(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _compared(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in ("and", "or", "unless"):
        yield from _compared(node.lhs)
        yield from _compared(node.rhs)
    else:
        yield from (side.prettify() for side in (node.lhs, node.rhs) if list(_below(side, "")))

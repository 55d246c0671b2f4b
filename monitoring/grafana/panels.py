"""How a panel and a dashboard are written down for Grafana (its classic dashboard model)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 41  # of Grafana 11.6; later ones migrate it on loading
COLUMNS, HEIGHTS = 24, {"stat": 4, "lines": 8, "stack": 8}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OWN = {
    "@run": 'job=~"$job",run=~"$run"',
    "@rank": 'job=~"$job",run=~"$run",rank=~"$rank"',
    "@instance": 'job=~"$job",run=~"$run",instance=~"$instance"',
}
"""What an expression may say for the chosen series: `mcl_step{@run}`, `{@rank}` for what every rank exports, and
`{@instance}` for what a build does."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: by Grafana's name for it; values are in base units.
        queries: legend to PromQL, in which `@run`, `@rank` and `@instance` stand for the chosen series.
        limit: where good ends; none where no value is good or bad in itself.
        good: the side of the limit that is good.
        kind: a number with its course behind it, lines over time, or areas that add up.
        width: in columns of 24.
        top: the largest value that there can be.
    """

    title: str
    description: str
    unit: str
    queries: Mapping[str, str]
    limit: float | None = None
    good: Literal["below", "above"] = "below"
    kind: Literal["stat", "lines", "stack"] = "lines"
    width: int = 8
    top: float | None = None

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """The panel at a place of the grid."""
        is_stat = self.kind == "stat"
        return {
            "id": number,
            "type": "stat" if is_stat else "timeseries",
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": HEIGHTS[self.kind]},
            "targets": [self._target(number, *query) for number, query in enumerate(self.queries.items())],
            "fieldConfig": {
                "defaults": {
                    "unit": self.unit,
                    **({} if self.top is None else {"min": 0, "max": self.top}),
                    "color": {"mode": "thresholds" if is_stat else "palette-classic"},
                    "thresholds": {"mode": "absolute", "steps": self._steps()},
                    "custom": {} if is_stat else self._drawing(),
                },
                "overrides": [],
            },
            "options": STAT if is_stat else LINES,
        }

    def _target(self, number: int, legend: str, expression: str) -> dict[str, Any]:
        for short, selector in OWN.items():
            expression = expression.replace(short, selector)
        letter = chr(ord("A") + number)
        return {"refId": letter, "datasource": SOURCE, "expr": expression, "legendFormat": legend, "range": True}

    def _steps(self) -> list[dict[str, Any]]:
        colours = ("green", "red") if self.good == "below" else ("red", "green")
        if self.limit is None:
            return [{"color": "green", "value": None}]
        return [{"color": colours[0], "value": None}, {"color": colours[1], "value": self.limit}]

    def _drawing(self) -> dict[str, Any]:
        is_stack = self.kind == "stack"
        return {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 40 if is_stack else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if is_stack else "none"},
            "thresholdsStyle": {"mode": "off" if self.limit is None else "dashed"},
        }


STAT: dict[str, Any] = {
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    "colorMode": "value",
    "graphMode": "area",
    "textMode": "value",
}
LINES: dict[str, Any] = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def dashboard(
    name: str, description: str, chosen_by: str, rows: Mapping[str, Sequence[Panel]], labels: Sequence[str]
) -> dict[str, Any]:
    """A whole dashboard, which nobody edits in the browser: the next start would lose it.

    Args:
        name: one word; the dashboard's address is `/d/mcl-NAME`.
        chosen_by: the metric whose labels offer the choices.
        rows: titles to panels.
        labels: that are chosen by, from the widest on.
    """
    return {
        "uid": f"mcl-{name}",
        "title": f"MCL / {name.capitalize()}",
        "description": description,
        "tags": ["mcl"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_choice(), *_label_choices(chosen_by, labels)]},
        "annotations": {"list": [_alerts()]},
        "links": [_link()],
        "panels": list(_panels(rows)),
    }


def _panels(rows: Mapping[str, Sequence[Panel]]) -> Iterator[dict[str, Any]]:
    """Rows from top to bottom, each filled from left to right."""
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            yield panel.to_json(number, x, y)
            x, height = x + panel.width, max(height, HEIGHTS[panel.kind])
        y += height


def _source_choice() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1}


def _label_choices(metric: str, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, label in enumerate(labels):
        wider = ",".join(f'{name}=~"${name}"' for name in labels[:number])
        query = f"label_values({metric}{{{wider}}}, {label})"
        yield {
            "name": label,
            "type": "query",
            "label": label.capitalize(),
            "datasource": SOURCE,
            "query": query,
            "refresh": 2,
            "sort": 7,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",  # `.*` would take what has no such label, too: a build is no rank
            "current": {"text": "All", "value": "$__all"},
        }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing",alertname=~"Mcl.*",run=~"$run"}',
    }


def _link() -> dict[str, Any]:
    return {
        "title": "MCL",
        "type": "dashboards",
        "tags": ["mcl"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "icon": "external link",
        "tooltip": "",
        "url": "",
        "targetBlank": False,
    }


# On more than one dashboard.
DISK_FREE = Panel(
    "Disk free",
    "Share of the disks of run folder, cache and checkpoints that is free.",
    "percentunit",
    {"{{run}} {{node}} {{volume}}": "node:mcl_disk_free:ratio{@run}"},
    limit=0.05,
    good="above",
    top=1,
)
HOST_MEMORY_FREE = Panel(
    "Host memory free",
    "Share of a node's memory that is still available.",
    "percentunit",
    {"{{node}}": "mcl_host_memory_available_bytes{@run} / mcl_host_memory_size_bytes{@run}"},
    limit=0.1,
    good="above",
    top=1,
)

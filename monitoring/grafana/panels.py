"""Panels and dashboards in Grafana's classic dashboard model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 41  # of Grafana 11.6; later versions migrate it on loading
COLUMNS, HEIGHTS = 24, {"stat": 4, "lines": 8, "stack": 8}
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Abbreviations in expressions: `mcl_step{@run}`, `{@rank}` for metrics of every rank, `{@instance}` for a build's.
SELECTORS = {
    "@run": 'job=~"$job",run=~"$run"',
    "@rank": 'job=~"$job",run=~"$run",rank=~"$rank"',
    "@instance": 'job=~"$job",run=~"$run",instance=~"$instance"',
}


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's name of the unit; values are in base units.
        queries: legend to PromQL, with the abbreviations of `SELECTORS`.
        limit: threshold between good and bad values; None if no value is good or bad in itself.
        good: the good side of the limit.
        kind: a number with its history behind it, lines over time, or stacked areas.
        width: in columns, of 24.
        top: largest possible value; the axis then starts at 0.
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
        """JSON model of the panel at a grid position."""
        is_stat = self.kind == "stat"
        return {
            "id": number,
            "type": "stat" if is_stat else "timeseries",
            "title": self.title,
            "description": self.description,
            "datasource": DATA_SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": HEIGHTS[self.kind]},
            "targets": [self._target(number, *query) for number, query in enumerate(self.queries.items())],
            "fieldConfig": {
                "defaults": {
                    "unit": self.unit,
                    **({} if self.top is None else {"min": 0, "max": self.top}),
                    "color": {"mode": "thresholds" if is_stat else "palette-classic"},
                    "thresholds": {"mode": "absolute", "steps": self._thresholds()},
                    "custom": {} if is_stat else self._line_style(),
                },
                "overrides": [],
            },
            "options": STAT if is_stat else LINES,
        }

    def _target(self, number: int, legend: str, expression: str) -> dict[str, Any]:
        for abbreviation, selector in SELECTORS.items():
            expression = expression.replace(abbreviation, selector)
        letter = chr(ord("A") + number)
        return {"refId": letter, "datasource": DATA_SOURCE, "expr": expression, "legendFormat": legend, "range": True}

    def _thresholds(self) -> list[dict[str, Any]]:
        first, second = ("green", "red") if self.good == "below" else ("red", "green")
        if self.limit is None:
            return [{"color": "green", "value": None}]
        return [{"color": first, "value": None}, {"color": second, "value": self.limit}]

    def _line_style(self) -> dict[str, Any]:
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
    name: str, description: str, variables_from: str, rows: Mapping[str, Sequence[Panel]], labels: Sequence[str]
) -> dict[str, Any]:
    """JSON model of a dashboard; it is read-only in the browser, where edits would be lost at the next start.

    Args:
        name: the dashboard's address is `/d/mcl-NAME`.
        variables_from: metric whose label values fill the variables.
        rows: row title to panels.
        labels: variables, widest first; each one narrows the next.
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
        "templating": {"list": [_data_source_variable(), *_label_variables(variables_from, labels)]},
        "annotations": {"list": [_alert_annotations()]},
        "links": [_dashboard_links()],
        "panels": list(_panels(rows)),
    }


def _panels(rows: Mapping[str, Sequence[Panel]]) -> Iterator[dict[str, Any]]:
    """Lay out rows from top to bottom and their panels from left to right."""
    number, y = 0, 0
    for title, panels in rows.items():
        number += 1
        position = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            yield panel.to_json(number, x, y)
            x, height = x + panel.width, max(height, HEIGHTS[panel.kind])
        y += height


def _data_source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1}


def _label_variables(metric: str, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, label in enumerate(labels):
        wider = ",".join(f'{name}=~"${name}"' for name in labels[:number])
        query = f"label_values({metric}{{{wider}}}, {label})"
        yield {
            "name": label,
            "type": "query",
            "label": label.capitalize(),
            "datasource": DATA_SOURCE,
            "query": query,
            "refresh": 2,
            "sort": 7,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",  # `.*` would also match series without the label, such as a build's, which has no rank
            "current": {"text": "All", "value": "$__all"},
        }


def _alert_annotations() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": DATA_SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing",alertname=~"Mcl.*",run=~"$run"}',
    }


def _dashboard_links() -> dict[str, Any]:
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


# Shared by several dashboards.
DISK_FREE = Panel(
    "Disk free",
    "Free share of the disks that hold run folder, cache and checkpoints.",
    "percentunit",
    {"{{run}} {{node}} {{volume}}": "node:mcl_disk_free:ratio{@run}"},
    limit=0.05,
    good="above",
    top=1,
)
HOST_MEMORY_FREE = Panel(
    "Host memory free",
    "Available share of each node's memory.",
    "percentunit",
    {"{{node}}": "mcl_host_memory_available_bytes{@run} / mcl_host_memory_size_bytes{@run}"},
    limit=0.1,
    good="above",
    top=1,
)

"""Rules that every dashboard follows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from grafana_foundation_sdk.models import units

from monitoring.grafana.write import DASHBOARDS, dashboard_json
from tests.support.published_schema import schema_errors
from tests.support.queries import DASHBOARD_JSON, INTERVAL, MONITORING, panel_queries, panels, rules, selectors

COUNTER_SUFFIXES = ("_total", "_count", "_sum", "_bucket")
UNITS = {value for name, value in vars(units).items() if name[0].isupper()}
RECORDED = {name for name, rule in rules() if "record" in rule}

each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARD_JSON.values(), ids=DASHBOARD_JSON)
each_query = pytest.mark.parametrize(
    "query", [query for _, query in panel_queries()], ids=[name for name, _ in panel_queries()]
)


def test_the_dashboard_files_match_their_source() -> None:
    expected = {f"{dashboard['uid']}.json": dashboard_json(dashboard) for dashboard in DASHBOARDS}
    found = {file.name: file.read_text() for file in (MONITORING / "grafana" / "dashboards").iterdir()}
    assert found == expected, "python -m monitoring.grafana.write"


@each_dashboard
def test_a_dashboard_is_valid_by_the_published_schema(dashboard: dict[str, Any]) -> None:
    assert schema_errors(dashboard) == []


def test_the_schema_check_finds_unknown_fields_and_wrong_types() -> None:
    def modified(change: Callable[[dict[str, Any]], None]) -> list[str]:
        dashboard = json.loads(json.dumps(next(iter(DASHBOARD_JSON.values()))))
        change(dashboard)
        return schema_errors(dashboard)

    assert modified(lambda dashboard: dashboard.update(colour="red")) == ["dashboard.colour: unknown"]
    wrong_choice = ["dashboard.graph_tooltip: 7 is not one of [0, 1, 2]"]
    assert modified(lambda dashboard: dashboard.update(graphTooltip=7)) == wrong_choice
    assert modified(lambda dashboard: panels(dashboard)[0]["targets"][0].update(exper="1"))
    assert modified(lambda dashboard: panels(dashboard)[0]["options"].update(colorMode="loud"))
    assert modified(lambda dashboard: panels(dashboard)[0]["gridPos"].update(w="wide"))


@each_dashboard
def test_a_dashboard_has_variables_for_source_job_run_and_rank_and_is_read_only(dashboard: dict[str, Any]) -> None:
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "job", "run", "instance" if dashboard["uid"] == "mcl-builder" else "rank"]
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    assert dashboard["editable"] is False


@each_dashboard
def test_a_panel_has_title_description_unit_thresholds_and_data_source(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"] in UNITS, panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@each_dashboard
def test_panels_have_unique_titles_and_ids_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in dashboard["panels"]]
        assert len(set(values)) == len(values), key
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in dashboard["panels"])
        for x, y in itertools.product(range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"]))
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@each_query
def test_a_query_is_valid_promql_and_selects_the_chosen_runs(query: str) -> None:
    found = selectors(query)
    assert found
    for name, _, matchers, _ in found:
        assert matchers["run"] == "$run", name
        assert matchers["job"] == "$job", name
        assert name in RECORDED or ":" not in name


@each_query
def test_counters_are_queried_as_rates_over_grafanas_interval(query: str) -> None:
    for name, function, _, is_range in selectors(query):
        is_counter = name.endswith(COUNTER_SUFFIXES)
        assert is_counter == (function in ("rate", "increase")), name
        assert is_counter == is_range, name
    assert query.count("[") == query.count(f"[{INTERVAL}]")

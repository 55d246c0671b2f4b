"""The rules that a dashboard keeps, whoever adds a panel."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from grafana_foundation_sdk.models import units

from monitoring.grafana.write import DASHBOARDS, text_of
from tests.support.published_schema import problems
from tests.support.queries import BOARDS, INTERVAL, MONITORING, panel_queries, panels, rules, selectors

COUNTER_ENDS = ("_total", "_count", "_sum", "_bucket")
UNITS = {value for name, value in vars(units).items() if name[0].isupper()}
RECORDED = {name for name, rule in rules() if "record" in rule}

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
each_query = pytest.mark.parametrize(
    "query", [query for _, query in panel_queries()], ids=[at for at, _ in panel_queries()]
)


def test_the_files_are_what_their_source_says() -> None:
    made = {f"{board['uid']}.json": text_of(board) for board in DASHBOARDS}
    found = {file.name: file.read_text() for file in (MONITORING / "grafana" / "dashboards").iterdir()}
    assert found == made, "python -m monitoring.grafana.write"


@each_board
def test_a_dashboard_is_one_by_the_published_schema(board: dict[str, Any]) -> None:
    assert problems(board) == []


def test_the_schema_finds_what_is_unknown_or_of_another_type() -> None:
    def spoilt(change: Callable[[dict[str, Any]], None]) -> list[str]:
        board = json.loads(json.dumps(next(iter(BOARDS.values()))))
        change(board)
        return problems(board)

    assert spoilt(lambda board: board.update(colour="red")) == ["dashboard.colour: unknown"]
    assert spoilt(lambda board: board.update(graphTooltip=7)) == ["dashboard.graph_tooltip: 7 is none of [0, 1, 2]"]
    assert spoilt(lambda board: panels(board)[0]["targets"][0].update(exper="1"))
    assert spoilt(lambda board: panels(board)[0]["options"].update(colorMode="loud"))
    assert spoilt(lambda board: panels(board)[0]["gridPos"].update(w="wide"))


@each_board
def test_source_job_run_and_rank_are_chosen_and_nothing_is_edited_in_the_browser(board: dict[str, Any]) -> None:
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names == ["datasource", "job", "run", "instance" if board["uid"] == "mcl-builder" else "rank"]
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert board["editable"] is False


@each_board
def test_a_panel_says_what_it_shows_in_which_unit_and_where_good_ends(board: dict[str, Any]) -> None:
    for panel in panels(board):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"] in UNITS, panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@each_board
def test_panels_have_titles_and_numbers_of_their_own_and_do_not_overlap(board: dict[str, Any]) -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in board["panels"]]
        assert len(set(values)) == len(values), key
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in board["panels"])
        for x, y in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@each_query
def test_a_query_is_promql_about_the_chosen_runs(query: str) -> None:
    found = selectors(query)
    assert found
    for name, _, matchers, _ in found:
        assert matchers["run"] == "$run", name
        assert matchers["job"] == "$job", name
        assert name in RECORDED or ":" not in name


@each_query
def test_counters_are_only_looked_at_as_rates_and_rates_over_grafanas_interval(query: str) -> None:
    for name, function, _, is_range in selectors(query):
        is_counter = name.endswith(COUNTER_ENDS)
        assert is_counter == (function in ("rate", "increase")), name
        assert is_counter == is_range, name
    assert query.count("[") == query.count(f"[{INTERVAL}]")

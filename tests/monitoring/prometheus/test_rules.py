"""The Prometheus rules by promtool, and their runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run.config import PretrainConfig
from mcl_dist.checkpoint.manager import CheckpointConfig
from mcl_dist.config import load_config
from mcl_dist.errors import EXIT_FAILURE
from tests.support.paths import REPOSITORY
from tests.support.queries import DASHBOARD_JSON, panels

RULES = REPOSITORY / "monitoring" / "prometheus"
UNIT_TESTS = Path(__file__).with_name("alerts.test.yml")
RECORDING_TESTS = UNIT_TESTS.with_name("recording.test.yml")
RUNBOOK = REPOSITORY / "docs" / "how-to" / "runbook.md"


def load_rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in load_rules("alerts.yml")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "config", "--lint=all", "--lint-fatal", RULES / "prometheus.yml"),
        ("promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES / "recording.yml", RULES / "alerts.yml"),
        ("promtool", "test", "rules", UNIT_TESTS, RECORDING_TESTS),
        ("amtool", "check-config", RULES.parent / "alertmanager" / "alertmanager.yml"),
    ],
    ids=lambda command: " ".join(map(str, command[:3])),
)
def test_prometheus_tools_accept_the_configuration_and_rules(command: tuple[str | Path, ...]) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = [test for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for test in case["alert_rule_test"]]
    for fires in (True, False):
        assert {test["alertname"] for test in tests if bool(test["exp_alerts"]) == fires} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_a_severity_a_summary_a_description_and_a_runbook_link(name: str) -> None:
    assert ALERTS[name]["labels"]["severity"] in ("critical", "warning")
    annotations = ALERTS[name]["annotations"]
    assert set(annotations) == {"summary", "description", "runbook"}
    assert annotations["runbook"] == f"docs/how-to/runbook.md#{name.lower()}"


def test_the_runbook_has_exactly_one_section_per_alert() -> None:
    text = RUNBOOK.read_text()
    sections = dict(re.findall(r"^## (\S+)\n\n\*(\w+)\* · ", text, re.MULTILINE))
    assert sections == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}
    for link in re.findall(r"\]\(#(\w+)\)", text):
        assert link in {name.lower() for name in ALERTS}


@pytest.mark.parametrize(
    "section", re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:], ids=lambda section: section.split()[0]
)
def test_a_runbook_section_has_signs_a_meaning_and_commands_to_run(section: str) -> None:
    for part in ("See", "Means", "Do"):
        assert f"- **{part}:**" in section
    assert "`" in section.split("- **Do:**")[1]


def test_the_runbook_refers_to_existing_dashboard_panels() -> None:
    titles = {name: {panel["title"] for panel in panels(dashboard)} for name, dashboard in DASHBOARD_JSON.items()}
    found = 0
    for line in " ".join(RUNBOOK.read_text().split()).split("dashboard *")[1:]:
        name, _, text = line.partition("*")
        for title in re.findall(r'"([^"]+)"', text.split(";")[0].split("**")[0]):
            assert title in titles[f"mcl-{name}"], title
            found += 1
    assert found > 10


def test_the_runbook_states_the_limit_of_failed_checkpoints_and_the_exit_code() -> None:
    section = RUNBOOK.read_text().split("## MclCheckpointFailing")[1].split("## ")[0]
    assert f"`checkpoint.max_failures` ({CheckpointConfig().max_failures})" in section
    assert f"exit code {EXIT_FAILURE}" in section


def test_the_runbook_uses_existing_configuration_keys_and_choices() -> None:
    sections = "|".join(field.name for field in fields(PretrainConfig))
    found = set(re.findall(rf"\b(?:{sections})\.\w+(?:=[a-z]+)?\b", RUNBOOK.read_text()))
    found -= {name for name in found if Path(name).suffix in (".yaml", ".jsonl")}
    assert len(found) > 10
    config = load_config(PretrainConfig, None, ["data.train=set", "run.dir=run"])
    for name in found:
        path, _, choice = name.partition("=")
        section, key = path.split(".")
        assert hasattr(getattr(config, section), key), name
        if choice:
            load_config(PretrainConfig, None, ["data.train=set", "run.dir=run", name])

"""What two ranks of a real run tell Prometheus, against what the run itself wrote down."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mcl_dist.events import PHASES
from monitoring.metrics.catalogue import SECTIONS, series_of
from tests.launch.cli.test_pretrain import kill_everything, metrics, start, words
from tests.support.ports import free_ports

SEEN = 10  # steps before the scrape
SECONDS = 120.0
FAMILIES = {metric.name.removesuffix("_total"): metric for section in SECTIONS.values() for metric in section}


def scraped(target: str) -> str:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def values(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples}


@dataclass(frozen=True)
class Told:
    """Targets and what each answered, and the run's own lines."""

    groups: list[dict[str, Any]]
    texts: list[str]
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Of a run that is killed once it has been asked."""
    run = tmp_path_factory.mktemp("exporting") / "run"
    settings = (f"monitoring.port={free_ports(2)}", "train.steps=9999", "checkpoint.every=4")
    process = start(*words(synthetic_shards, run, *settings), "--ranks", "2")
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < SEEN:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        groups = json.loads((run / "targets.json").read_text())
        texts = [scraped(group["targets"][0]) for group in groups]
    finally:
        kill_everything(process, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return Told(groups, texts, [json.loads(line) for line in lines if line.endswith("\n")])


@pytest.mark.slow
def test_what_is_scraped_agrees_with_what_the_run_writes_down(told: Told) -> None:
    first, second = map(values, told.texts)
    step = int(first["mcl_step",])
    assert step >= SEEN
    done, line = told.lines[:step], told.lines[step - 1]
    for term in ("inter", "intra", "alignment", "order"):
        assert first["mcl_loss", term] == pytest.approx(line[f"loss_{term}"])
    for term in ("positive", "negative", "alignment"):
        assert first["mcl_similarity", term] == pytest.approx(line[f"similarity_{term}"])
    for name, expected in {
        "mcl_loss total": line["loss"],
        "mcl_learning_rate": line["learning_rate"],
        "mcl_gradient_norm": line["gradient_norm"],
        "mcl_momentum": line["momentum"],
        "mcl_queue_fill_ratio": line["queue_fill"],
        "mcl_queue_age_steps": line["queue_age"],
        "mcl_data_wait_ratio": line["data_wait_ratio"],
        "mcl_flops_per_second": line["flops_per_second"],
        "mcl_videos_total": sum(each["videos_per_second"] * each["seconds"] for each in done),
        "mcl_flops_total": sum(each["flops_per_second"] * each["seconds"] for each in done),
        "mcl_step_seconds_sum": sum(each["seconds"] for each in done),
        "mcl_step_seconds_count": step,
        "mcl_steps_skipped_total": sum(not each["taken"] for each in done),
    }.items():
        assert first[tuple(name.split())] == pytest.approx(expected), name
    for phase in PHASES:
        spent = sum(each["phases"].get(phase, 0.0) for each in done)
        assert first["mcl_step_phase_seconds_sum", phase] == pytest.approx(spent), phase
    assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.02)
    assert second["mcl_step_seconds_count",] == pytest.approx(step, abs=3)
    assert ("mcl_step",) not in second


@pytest.mark.slow
def test_targets_name_every_rank_and_its_run(told: Told) -> None:
    labels = [group["labels"] for group in told.groups]
    assert [each["rank"] for each in labels] == ["0", "1"]
    assert {each["run"] for each in labels} == {"run"}
    ports = [int(group["targets"][0].rpartition(":")[2]) for group in told.groups]
    assert ports[1] == ports[0] + 1


@pytest.mark.slow
def test_nothing_is_exported_that_the_catalogue_does_not_know_and_no_more_series(told: Told) -> None:
    for text, scopes in zip(told.texts, (("run", "rank", "node"), ("rank",)), strict=True):
        for family in text_string_to_metric_families(text):
            metric = FAMILIES[family.name.removesuffix("_total")]
            assert (family.type, family.documentation) == (metric.kind, metric.help) or metric in SECTIONS["Process"]
            assert metric.scope in scopes
        assert len(values(text)) <= series_of(*scopes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say_of_a_scrape(told: Told) -> None:
    for text in told.texts:
        found = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (found.returncode, found.stdout + found.stderr) == (0, "")

"""Scraped metrics of two ranks of a real run, compared with the run's own files."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mcl_dist.events import PHASES
from monitoring.metrics.catalogue import SECTIONS, max_series
from tests.launch.cli.test_pretrain import arguments_for, kill_everything, metrics, start
from tests.support.ports import free_ports
from tests.support.real_prometheus import until

SEEN = 10  # steps before the scrape
SECONDS = 120.0
FAMILIES = {metric.name.removesuffix("_total"): metric for section in SECTIONS.values() for metric in section}


def scrape(target: str) -> str:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def values(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples}


@dataclass(frozen=True)
class ScrapedRun:
    """Scrape targets, the answer of each, and the records of the run's metrics file."""

    groups: list[dict[str, Any]]
    texts: list[str]
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def scraped_run(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> ScrapedRun:
    """Scrape a run, then kill it."""
    run = tmp_path_factory.mktemp("scraped") / "run"
    settings = (f"monitoring.port={free_ports(2)}", "train.steps=9999", "checkpoint.every=4")
    process = start(*arguments_for(synthetic_shards, run, *settings), "--ranks", "2")
    try:

        def has_steps() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return (run / "metrics.jsonl").exists() and len(metrics(run)) >= SEEN

        assert until(has_steps, SECONDS)
        groups = json.loads((run / "targets.json").read_text())
        texts = [scrape(group["targets"][0]) for group in groups]
    finally:
        kill_everything(process, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return ScrapedRun(groups, texts, [json.loads(line) for line in lines if line.endswith("\n")])


@pytest.mark.slow
def test_scraped_metrics_agree_with_the_metrics_file(scraped_run: ScrapedRun) -> None:
    first, second = map(values, scraped_run.texts)
    step = int(first["mcl_step",])
    assert step >= SEEN
    done, line = scraped_run.lines[:step], scraped_run.lines[step - 1]
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
        seconds = sum(each["phases"].get(phase, 0.0) for each in done)
        assert first["mcl_step_phase_seconds_sum", phase] == pytest.approx(seconds), phase
    assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.02)
    assert second["mcl_step_seconds_count",] == pytest.approx(step, abs=3)
    assert ("mcl_step",) not in second


@pytest.mark.slow
def test_the_targets_name_every_rank_and_its_run(scraped_run: ScrapedRun) -> None:
    labels = [group["labels"] for group in scraped_run.groups]
    assert [each["rank"] for each in labels] == ["0", "1"]
    assert {each["run"] for each in labels} == {"run"}
    ports = [int(group["targets"][0].rpartition(":")[2]) for group in scraped_run.groups]
    assert ports[1] == ports[0] + 1


@pytest.mark.slow
def test_all_exported_metrics_are_in_the_catalogue_and_their_series_within_its_limit(scraped_run: ScrapedRun) -> None:
    for text, scopes in zip(scraped_run.texts, (("run", "rank", "node"), ("rank",)), strict=True):
        for family in text_string_to_metric_families(text):
            metric = FAMILIES[family.name.removesuffix("_total")]
            assert (family.type, family.documentation) == (metric.kind, metric.help) or metric in SECTIONS["Process"]
            assert metric.scope in scopes
        assert len(values(text)) <= max_series(*scopes)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_reports_no_problems(scraped_run: ScrapedRun) -> None:
    for text in scraped_run.texts:
        found = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (found.returncode, found.stdout + found.stderr) == (0, "")

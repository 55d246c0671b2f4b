from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from mcl_dist.events import BAD_SAMPLE_REASONS, LOADER_STAGES, REFUSAL_REASONS
from monitoring.metrics.catalogue import METRICS, SECTIONS, Scope, max_series
from monitoring.metrics.catalogue_page import NODE, RANKS, page
from monitoring.metrics.registry import Registry
from tests.support.paths import REPOSITORY

SCRAPE_SECONDS = 0.05


def full_registry(scopes: tuple[Scope, ...]) -> CollectorRegistry:
    """Collectors in which every metric of the scopes has every listed label value."""
    collectors, registry = CollectorRegistry(), Registry(scopes)
    for metric in METRICS.values():
        for labels in [(value,) for value in metric.values] or [("some",) * len(metric.labels)]:
            if metric.kind == "histogram":
                registry.observe(metric.name, 0.3, *labels)
            else:
                registry.set(metric.name, 0.3, *labels)
    collectors.register(registry)
    ProcessCollector(registry=collectors)
    return collectors


def num_series(text: bytes) -> int:
    return sum(not line.startswith(b"#") for line in text.splitlines())


def test_the_metrics_page_matches_the_catalogue() -> None:
    assert (REPOSITORY / "docs" / "reference" / "metrics.md").read_text() == page()


def test_metric_names_are_unique_and_follow_prometheus_conventions() -> None:
    names = [metric.name for metrics in SECTIONS.values() for metric in metrics]
    assert len(set(names)) == len(names)
    for metric in METRICS.values():
        assert metric.name.startswith("mcl_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("mcl_loader_stage_cpu_seconds_total", LOADER_STAGES),
        ("mcl_loader_bad_samples_total", BAD_SAMPLE_REASONS),
        ("mcl_build_refused_total", REFUSAL_REASONS),
    ],
)
def test_label_values_are_those_that_the_loader_and_the_builder_report(metric: str, values: tuple[str, ...]) -> None:
    assert METRICS[metric].values == values


@pytest.mark.slow
def test_a_run_of_512_ranks_exports_the_documented_number_of_series_and_is_scraped_fast() -> None:
    series, slowest = 0, 0.0
    for rank in range(RANKS):
        scopes: tuple[Scope, ...] = ("rank",)
        scopes += ("node",) if rank % NODE == 0 else ()
        scopes += ("run",) if rank == 0 else ()
        collectors = full_registry(scopes)
        seconds = []
        for _ in range(2 if rank < NODE else 1):  # the faster one counts: load on the machine only adds time
            start = time.perf_counter()
            text = generate_latest(collectors)
            seconds.append(time.perf_counter() - start)
        slowest = max(slowest, min(seconds)) if rank < NODE else slowest
        assert num_series(text) == max_series(*scopes)
        series += num_series(text)
    assert f"{series:,} for {RANKS} ranks" in page()
    assert slowest < SCRAPE_SECONDS

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from dataloading.shards.bad_sample import REASONS
from monitoring.metrics.catalogue import BAD_SAMPLES, OWN, SECTIONS, Scope, series_of
from monitoring.metrics.catalogue_page import NODE, RANKS, page
from monitoring.metrics.registry import Registry
from tests.support.paths import REPOSITORY

SCRAPE_SECONDS = 0.05


def full(scopes: tuple[Scope, ...]) -> CollectorRegistry:
    """A registry in which every metric of the scopes has every value of its label."""
    registry, board = CollectorRegistry(), Registry(scopes)
    for metric in OWN.values():
        for labels in [(value,) for value in metric.values] or [("some",) * len(metric.labels)]:
            if metric.kind == "histogram":
                board.observe(metric.name, 0.3, *labels)
            else:
                board.set(metric.name, 0.3, *labels)
    registry.register(board)
    ProcessCollector(registry=registry)
    return registry


def num_series(text: bytes) -> int:
    return sum(not line.startswith(b"#") for line in text.splitlines())


def test_the_page_is_made_from_the_catalogue() -> None:
    assert (REPOSITORY / "docs" / "metrics.md").read_text() == page()


def test_names_are_used_once_and_follow_prometheus() -> None:
    names = [metric.name for metrics in SECTIONS.values() for metric in metrics]
    assert len(set(names)) == len(names)
    for metric in OWN.values():
        assert metric.name.startswith("mcl_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")


def test_reasons_are_those_of_the_loader() -> None:
    assert BAD_SAMPLES == REASONS


def test_512_ranks_have_as_many_series_as_the_page_says_and_each_is_scraped_in_time() -> None:
    series, slowest = 0, 0.0
    for rank in range(RANKS):
        scopes: tuple[Scope, ...] = ("rank",)
        scopes += ("node",) if rank % NODE == 0 else ()
        scopes += ("run",) if rank == 0 else ()
        registry = full(scopes)
        seconds = []
        for _ in range(2 if rank < NODE else 1):  # whatever else the machine does only adds
            start = time.perf_counter()
            text = generate_latest(registry)
            seconds.append(time.perf_counter() - start)
        slowest = max(slowest, min(seconds)) if rank < NODE else slowest
        assert num_series(text) == series_of(*scopes)
        series += num_series(text)
    assert f"{series:,} for {RANKS} ranks" in page()
    assert slowest < SCRAPE_SECONDS

"""What feeds the training, for Prometheus: a loader's own running counts, read off when it reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mcl_dist.events import LoaderReport


class LoaderMetrics(Collector):
    """The first rank's newest report as metrics; counters restart with the run, as Prometheus expects of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._report: LoaderReport | None = None
        registry.register(self)

    def take(self, report: LoaderReport) -> None:
        """Show this report from now on."""
        self._report = report

    def collect(self) -> Iterable[Metric]:
        """The metrics of the newest report, none before the first."""
        report = self._report
        if report is None:
            return
        for name in ("expected", "delivered", "replaced"):
            what = f"Samples of the first rank that were {name}."
            yield CounterMetricFamily(f"mcl_loader_samples_{name}", what, value=getattr(report, name))
        yield GaugeMetricFamily(
            "mcl_loader_samples_unaccounted",
            "Samples expected, minus delivered, minus replaced; never anything but 0.",
            value=report.expected - report.delivered - report.replaced,
        )
        yield GaugeMetricFamily("mcl_loader_queue_batches", "Batches that are ready.", value=report.queue)
        yield CounterMetricFamily(
            "mcl_loader_wait_seconds", "Time that training waited for data.", value=report.waited_seconds
        )
        yield _labelled("mcl_loader_bad_samples", "Different bad samples.", "reason", report.bad_samples)
        yield _labelled("mcl_loader_stage_cpu_seconds", "CPU time of the loader.", "stage", report.stages)
        yield from _storage(report)


def _storage(report: LoaderReport) -> Iterable[Metric]:
    counts = report.storage
    for name, what in (
        ("bytes_read", "Bytes read or received."),
        ("requests", "Requests to the store."),
        ("cache_hits", "Shards found in the cache."),
        ("cache_misses", "Shards not found in the cache."),
        ("cache_evictions", "Shards evicted from the cache."),
    ):
        yield CounterMetricFamily(f"mcl_storage_{name}", what, value=counts.get(name, 0))
    retries = counts.get("retries", {})
    yield _labelled("mcl_storage_retries", "Requests that had to be made again.", "reason", retries)


def _labelled(name: str, what: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, what, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family

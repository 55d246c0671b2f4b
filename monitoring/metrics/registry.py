"""Registry of a process's exported metrics: the catalogue's metrics and their current values."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from monitoring.metrics import catalogue
from monitoring.metrics.catalogue import METRICS, OTHER, Scope


@dataclass
class _Histogram:
    """Number of values in each bucket, the +Inf bucket last, and their sum."""

    buckets: list[int]
    total: float = 0.0


@dataclass
class _Family:
    """A metric with its values by label values; a histogram has `histograms` instead."""

    metric: catalogue.Metric
    values: dict[tuple[str, ...], float] = field(default_factory=dict)
    histograms: dict[tuple[str, ...], _Histogram] = field(default_factory=dict)


class Registry(Collector):
    """Thread-safe values of the metrics that a process exports.

    A counter starts at 0 for every listed value of its label, so that Prometheus sees the first increase. A gauge is
    absent until it is set. So is a counter that spans restarts: starting it at 0 would show its whole value as one
    increase. Metrics outside the scopes of the process are ignored.
    """

    def __init__(self, scopes: Collection[Scope]) -> None:
        self._lock = threading.RLock()
        self._families = {name: _Family(metric) for name, metric in METRICS.items() if metric.scope in scopes}
        self._before_scrape: list[Callable[[], None]] = []
        for name, family in self._families.items():
            if family.metric.kind == "counter" and not family.metric.spans_restarts:
                self.update(name, dict.fromkeys(family.metric.values, 0.0) if family.metric.labels else 0.0)

    def atomic(self) -> AbstractContextManager[bool]:
        """Make all changes inside the block visible to scrapes at once."""
        return self._lock

    def before_scrape(self, update: Callable[[], None]) -> None:
        """Call `update` at the start of every scrape, for values that are read on demand."""
        self._before_scrape.append(update)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge, or a counter whose total is kept elsewhere."""
        if family := self._families.get(name):
            with self._lock:
                family.values[_bounded(family.metric, labels)] = value

    def update(self, name: str, values: float | Mapping[str, float]) -> None:
        """Set a metric without a label, or one value for each label value; unlisted label values are summed."""
        if not isinstance(values, Mapping):
            self.set(name, values)
            return
        if family := self._families.get(name):
            bounded: dict[tuple[str, ...], float] = {}
            for label, value in values.items():
                key = _bounded(family.metric, (label,))
                bounded[key] = bounded.get(key, 0.0) + value
            with self._lock:
                family.values.update(bounded)

    def add(self, name: str, amount: float = 1.0, *labels: str) -> None:
        """Increase a counter."""
        if family := self._families.get(name):
            key = _bounded(family.metric, labels)
            with self._lock:
                family.values[key] = family.values.get(key, 0.0) + amount

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        if family := self._families.get(name):
            key, bounds = _bounded(family.metric, labels), family.metric.buckets
            with self._lock:
                histogram = family.histograms.setdefault(key, _Histogram([0] * (len(bounds) + 1)))
                histogram.buckets[bisect_left(bounds, value)] += 1
                histogram.total += value

    def collect(self) -> Iterable[Metric]:
        """Return the metric families; prometheus_client calls this at each scrape."""
        for update in self._before_scrape:
            update()
        with self._lock:
            return [_exported(family) for family in self._families.values() if family.values or family.histograms]


def _bounded(metric: catalogue.Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
    return (OTHER,) if metric.values and labels[0] not in metric.values else labels


def _exported(family: _Family) -> Metric:
    metric = family.metric
    if metric.kind == "histogram":
        exported = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        bounds = [*(str(float(bound)) for bound in metric.buckets), "+Inf"]
        for labels, histogram in family.histograms.items():
            cumulative = zip(bounds, accumulate(histogram.buckets), strict=True)
            exported.add_metric(labels, list(cumulative), histogram.total)
        return exported
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    values = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in family.values.items():
        values.add_metric(labels, value)
    return values

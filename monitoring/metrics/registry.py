"""What one process exports: the values of the catalogue's metrics, as they are now."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from monitoring.metrics import catalogue
from monitoring.metrics.catalogue import OTHER, OWN, Scope


@dataclass
class _Counts:
    """A histogram's: how many values fell into each bucket, the one above all included, and their sum."""

    in_bucket: list[int]
    total: float = 0.0


@dataclass
class _Shown:
    """A metric with its values by their labels; a histogram has counts instead."""

    metric: catalogue.Metric
    values: dict[tuple[str, ...], float] = field(default_factory=dict)
    counts: dict[tuple[str, ...], _Counts] = field(default_factory=dict)


class Registry(Collector):
    """Values to be scraped; any thread may change them.

    Counters are there from the start, at 0 for every known value of their label, so that the first increase counts;
    gauges, and counters that span restarts, once they are known: a 0 before would make all that they have come to look
    like an increase. Metrics of other scopes than the process's are not shown, whoever sets them.
    """

    def __init__(self, scopes: Collection[Scope]) -> None:
        self._lock = threading.RLock()
        self._shown = {name: _Shown(metric) for name, metric in OWN.items() if metric.scope in scopes}
        self._before_scrape: list[Callable[[], None]] = []
        for name, shown in self._shown.items():
            if shown.metric.kind == "counter" and not shown.metric.spans_restarts:
                self.update(name, dict.fromkeys(shown.metric.values, 0.0) if shown.metric.labels else 0.0)

    def at_once(self) -> AbstractContextManager[bool]:
        """Within, no scrape sees some changes and not yet the others."""
        return self._lock

    def before_scrape(self, look: Callable[[], None]) -> None:
        """Call this at the start of every scrape, for what is known only then."""
        self._before_scrape.append(look)

    def set(self, name: str, value: float, *labels: str) -> None:
        """The value is now this: a gauge's, or what a counter that others keep has come to."""
        if shown := self._shown.get(name):
            with self._lock:
                shown.values[_bounded(shown.metric, labels)] = value

    def update(self, name: str, values: float | Mapping[str, float]) -> None:
        """`set`, of a metric without a label or for each value of its label; what `other` stands for is added up."""
        if not isinstance(values, Mapping):
            self.set(name, values)
            return
        if shown := self._shown.get(name):
            bounded: dict[tuple[str, ...], float] = {}
            for label, value in values.items():
                key = _bounded(shown.metric, (label,))
                bounded[key] = bounded.get(key, 0.0) + value
            with self._lock:
                shown.values.update(bounded)

    def add(self, name: str, amount: float = 1.0, *labels: str) -> None:
        """So much more of a counter."""
        if shown := self._shown.get(name):
            key = _bounded(shown.metric, labels)
            with self._lock:
                shown.values[key] = shown.values.get(key, 0.0) + amount

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One more value of a histogram."""
        if shown := self._shown.get(name):
            key, bounds = _bounded(shown.metric, labels), shown.metric.buckets
            with self._lock:
                counts = shown.counts.setdefault(key, _Counts([0] * (len(bounds) + 1)))
                counts.in_bucket[bisect_left(bounds, value)] += 1
                counts.total += value

    def collect(self) -> Iterable[Metric]:
        """What Prometheus' client asks for at a scrape."""
        for look in self._before_scrape:
            look()
        with self._lock:
            return [_family(shown) for shown in self._shown.values() if shown.values or shown.counts]


def _bounded(metric: catalogue.Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
    return (OTHER,) if metric.values and labels[0] not in metric.values else labels


def _family(shown: _Shown) -> Metric:
    metric = shown.metric
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        bounds = [*(str(float(bound)) for bound in metric.buckets), "+Inf"]
        for labels, counts in shown.counts.items():
            cumulative = zip(bounds, accumulate(counts.in_bucket), strict=True)
            histogram.add_metric(labels, list(cumulative), counts.total)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in shown.values.items():
        family.add_metric(labels, value)
    return family

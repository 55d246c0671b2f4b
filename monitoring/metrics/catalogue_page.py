"""Write `docs/reference/metrics.md` from the catalogue.

Usage: `python -m monitoring.metrics.catalogue_page > docs/reference/metrics.md`.
"""

from collections.abc import Iterator

from monitoring.metrics.catalogue import SECTIONS, Metric, max_series

RANKS, NODE = 512, 8  # example run whose series are counted: ranks, and ranks per node

INTRODUCTION = """\
# Metrics

Generated from `monitoring/metrics/catalogue.py` by
`python -m monitoring.metrics.catalogue_page > docs/reference/metrics.md`; a test checks that the two agree.

Every rank serves its metrics at port `monitoring.port` + local rank. The scope is the exporter of a metric: `run` is
rank 0 for the whole run, `rank` every rank, `node` the first rank of each machine, `build` a build of a shard set.
Prometheus takes the labels `run`, `rank` and `node` from `targets.json` and adds `job` and `instance` itself.

A counter starts at 0 with its process, for each value of its label. Three kinds of metrics are absent until their value
is known: gauges, GPU metrics on machines without a GPU, and the counters that continue over all restarts of a run
(`mcl_restarts_total`, `mcl_run_seconds_total`, `mcl_productive_seconds_total`, `mcl_lost_seconds_total`). An unlisted
label value is exported as `other`.

A build also exports the section Process, without the label `rank`. `mcl bench loader` exports Loader and Process.
Metrics that a build pushes to a Pushgateway have the labels `job="mcl-build"`, `run` (name of the set's folder) and
`instance` (the machine).
"""


def page() -> str:
    """The whole page in Markdown."""
    return "\n".join([INTRODUCTION, *_series(), *_sections()])


def _series() -> Iterator[str]:
    rank, node, run = max_series("rank"), max_series("rank", "node"), max_series("rank", "node", "run")
    total = RANKS * rank + RANKS // NODE * (node - rank) + run - node
    yield "## Number of series\n"
    yield f"Upper bounds, with a GPU: {rank} for a rank, {node} for the first rank of a machine, {run} for rank 0;"
    yield f"{total:,} for {RANKS} ranks on {RANKS // NODE} machines. A scrape of one rank takes less than 50 ms (a test"
    yield "checks both).\n"


def _sections() -> Iterator[str]:
    for name, metrics in SECTIONS.items():
        yield f"## {name}\n"
        yield "| name | type | scope | unit | label | meaning |"
        yield "|---|---|---|---|---|---|"
        yield from map(_row, metrics)
        yield ""


def _row(metric: Metric) -> str:
    label = ", ".join(f"`{label}`" for label in metric.labels)
    label += f": {', '.join(metric.values)}" if metric.values else ""
    return f"| `{metric.name}` | {metric.kind} | {metric.scope} | {metric.unit} | {label} | {metric.help} |"


if __name__ == "__main__":
    print(page(), end="")

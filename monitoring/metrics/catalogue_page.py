"""`docs/metrics.md`, made from the catalogue: `python -m monitoring.metrics.catalogue_page > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator

from monitoring.metrics.catalogue import SECTIONS, Metric, series_of

RANKS, NODE = 512, 8  # of the run whose series are counted

INTRODUCTION = """\
# Metrics

Generated from `monitoring/metrics/catalogue.py` by
`python -m monitoring.metrics.catalogue_page > docs/metrics.md`; a test keeps them equal.

Every rank answers at `monitoring.port` plus its number on the machine. Scope says who exports a metric: `run` the first
rank, for all of them; `rank` every rank; `node` the first rank of every machine; `build` a build of a shard set.
`run`, `rank` and `node` are labels of the targets, which Prometheus takes from `targets.json`; `job` and `instance` are
its own. Counters of a process start at 0 with it, and for every value of their label. Those that go on over all
restarts of a run (`mcl_restarts_total`, and the seconds of the run, productive and lost) are absent until a start has
taken them up again, gauges until they are known, those of a GPU where there is none. A label value that is not listed
counts as `other`.
Of a build there is the section Process, too, without a label `rank`. `mcl bench loader` exports Loader and Process.
Pushed to a gateway, a build's series have the labels `job="mcl-build"`, `run`, the name of the set's folder, and
`instance`, the machine.
"""


def page() -> str:
    """The whole document."""
    return "\n".join([INTRODUCTION, *_series(), *_sections()])


def _series() -> Iterator[str]:
    rank, node, run = series_of("rank"), series_of("rank", "node"), series_of("rank", "node", "run")
    total = RANKS * rank + RANKS // NODE * (node - rank) + run - node
    yield "## How many series\n"
    yield f"At the most, with a GPU: {rank} a rank, {node} the first rank of a machine, {run} the first of a run;"
    yield f"{total:,} for {RANKS} ranks on {RANKS // NODE} machines. A scrape of one rank takes less than 50 ms (a test"
    yield "holds both).\n"


def _sections() -> Iterator[str]:
    for name, metrics in SECTIONS.items():
        yield f"## {name}\n"
        yield "| name | type | scope | unit | label | what it is |"
        yield "|---|---|---|---|---|---|"
        yield from map(_row, metrics)
        yield ""


def _row(metric: Metric) -> str:
    label = ", ".join(f"`{label}`" for label in metric.labels)
    label += f": {', '.join(metric.values)}" if metric.values else ""
    return f"| `{metric.name}` | {metric.kind} | {metric.scope} | {metric.unit} | {label} | {metric.help} |"


if __name__ == "__main__":
    print(page(), end="")

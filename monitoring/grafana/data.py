"""Dashboard "data": what feeds the training, from the store to the batch."""

from __future__ import annotations

from monitoring.grafana.panels import DISK_FREE, Panel, dashboard


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}{{@rank}}[$__rate_interval]))"


def _per_sample(counter: str, by: str) -> str:
    samples = "sum(rate(mcl_loader_samples_delivered_total{@rank}[$__rate_interval]))"
    return f"{_rate(counter, by)} / on () group_left {samples}"


SAMPLES = [
    Panel(
        "Samples",
        "Samples that a step expected, that came, and that had to be replaced by others.",
        "cps",
        {
            what: f"sum(rate(mcl_loader_samples_{what}_total{{@rank}}[$__rate_interval]))"
            for what in ("expected", "delivered", "replaced")
        },
    ),
    Panel(
        "Replaced",
        "Share of the samples that could not be used.",
        "percentunit",
        {"{{run}}": "run:mcl_loader_samples_replaced:ratio15m{@run}"},
        limit=0.001,
        top=1,
    ),
    Panel(
        "Bad samples by reason",
        "Different samples found bad; `bad_samples.jsonl` in the run's folder lists them.",
        "none",
        {"{{reason}}": "sum by (reason) (increase(mcl_loader_bad_samples_total{@rank}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Unaccounted for",
        "Samples expected, minus delivered, minus replaced. Never anything but 0.",
        "none",
        {"{{run}} {{rank}}": "abs(mcl_loader_samples_unaccounted{@rank})"},
        limit=1,
    ),
    Panel(
        "Waiting for data",
        "Share of the time in which a rank waits for its next batch.",
        "percentunit",
        {"{{run}} {{rank}}": _rate("mcl_loader_wait_seconds_total", "run, rank")},
        limit=0.2,
        top=1,
    ),
    Panel(
        "Batches ready",
        "Batches made ahead of the step. At 0 training waits.",
        "none",
        {"{{run}} {{rank}}": "mcl_loader_queue_batches{@rank}"},
        limit=1,
        good="above",
    ),
]

COST = [
    Panel(
        "CPU time a sample by stage",
        "What the loader's own process spends on a sample; with `data.workers` most is in the workers.",
        "s",
        {"{{stage}}": _per_sample("mcl_loader_stage_cpu_seconds_total", "stage")},
        kind="stack",
    ),
    Panel(
        "CPU time of workers",
        "CPU seconds in a second of a rank's worker processes. 0 without `data.workers`.",
        "none",
        {"{{run}} {{rank}}": _rate("mcl_loader_worker_cpu_seconds_total", "run, rank")},
    ),
    Panel(
        "Memory of workers",
        "The most that a rank's worker processes have held. 0 without `data.workers`.",
        "bytes",
        {"{{run}} {{rank}}": "mcl_loader_worker_peak_bytes{@rank}"},
    ),
]

STORE = [
    Panel(
        "Bytes read",
        "From the store or the disk, and how many of them were decoded.",
        "Bps",
        {what: f"sum(rate(mcl_storage_bytes_{what}_total{{@rank}}[$__rate_interval]))" for what in ("read", "decoded")},
    ),
    Panel(
        "Requests",
        "Requests to the store or the disk, those made again included.",
        "reqps",
        {"{{run}}": _rate("mcl_storage_requests_total", "run")},
    ),
    Panel(
        "Retries by reason",
        "Requests that had to be made again. Storms of them mean a store that is overloaded or ill.",
        "reqps",
        {"{{reason}}": _rate("mcl_storage_retries_total", "reason")},
        limit=1,
    ),
    Panel(
        "Share of requests made again",
        "From one in twenty on, somebody is told.",
        "percentunit",
        {"{{run}}": "run:mcl_storage_retries:ratio5m{@run}"},
        limit=0.05,
    ),
    Panel(
        "Time at the store by stage",
        "Wall seconds in a second, over all threads.",
        "none",
        {"{{stage}}": _rate("mcl_storage_seconds_total", "stage")},
        kind="stack",
    ),
    Panel(
        "Cache",
        "Shards found in `data.cache`, not found, evicted, and fetched again because they were damaged there.",
        "cps",
        {
            what: f"sum(rate(mcl_storage_cache_{what}_total{{@rank}}[$__rate_interval]))"
            for what in ("hits", "misses", "evictions", "repairs")
        },
    ),
    DISK_FREE,
]

DATA = dashboard(
    "data",
    "What feeds the training: samples, what they cost, and what the store answers.",
    "mcl_loader_samples_expected_total",
    {"What comes": SAMPLES, "What they cost": COST, "Store and cache": STORE},
    ("job", "run", "rank"),
)

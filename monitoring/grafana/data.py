"""Dashboard "data": the input pipeline, from the store to the batch."""

from monitoring.grafana.panels import DISK_FREE, Panel, dashboard


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}{{@rank}}[$__rate_interval]))"


def _per_sample(counter: str, by: str) -> str:
    samples = "sum(rate(mcl_loader_samples_delivered_total{@rank}[$__rate_interval]))"
    return f"{_rate(counter, by)} / on () group_left {samples}"


SAMPLES = [
    Panel(
        "Samples",
        "Requested, delivered and replaced samples per second.",
        "cps",
        {
            outcome: f"sum(rate(mcl_loader_samples_{outcome}_total{{@rank}}[$__rate_interval]))"
            for outcome in ("expected", "delivered", "replaced")
        },
    ),
    Panel(
        "Replaced",
        "Share of samples that were bad and replaced by others.",
        "percentunit",
        {"{{run}}": "run:mcl_loader_samples_replaced:ratio15m{@run}"},
        limit=0.001,
        top=1,
    ),
    Panel(
        "Bad samples by reason",
        "Distinct bad samples; `bad_samples.jsonl` in the run folder lists them.",
        "none",
        {"{{reason}}": "sum by (reason) (increase(mcl_loader_bad_samples_total{@rank}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Unaccounted samples",
        "Requested samples that were neither delivered nor replaced. Always 0 in a correct loader.",
        "none",
        {"{{run}} {{rank}}": "abs(mcl_loader_samples_unaccounted{@rank})"},
        limit=1,
    ),
    Panel(
        "Data wait",
        "Share of time that a rank waits for its next batch.",
        "percentunit",
        {"{{run}} {{rank}}": _rate("mcl_loader_wait_seconds_total", "run, rank")},
        limit=0.2,
        top=1,
    ),
    Panel(
        "Batches ready",
        "Batches in the prefetch queue. At 0, training waits.",
        "none",
        {"{{run}} {{rank}}": "mcl_loader_queue_batches{@rank}"},
        limit=1,
        good="above",
    ),
]

COST = [
    Panel(
        "CPU time per sample by stage",
        "CPU time of the loader for one sample. With `data.workers`, most of it is in the worker processes.",
        "s",
        {"{{stage}}": _per_sample("mcl_loader_stage_cpu_seconds_total", "stage")},
        kind="stack",
    ),
    Panel(
        "CPU time of workers",
        "CPU seconds per second of a rank's worker processes. 0 without `data.workers`.",
        "none",
        {"{{run}} {{rank}}": _rate("mcl_loader_worker_cpu_seconds_total", "run, rank")},
    ),
    Panel(
        "Memory of workers",
        "Sum of the peak memory of a rank's worker processes. 0 without `data.workers`.",
        "bytes",
        {"{{run}} {{rank}}": "mcl_loader_worker_peak_bytes{@rank}"},
    ),
]

STORE = [
    Panel(
        "Bytes read",
        "Bytes read from the store or disk, and bytes passed to the decoder, per second.",
        "Bps",
        {kind: f"sum(rate(mcl_storage_bytes_{kind}_total{{@rank}}[$__rate_interval]))" for kind in ("read", "decoded")},
    ),
    Panel(
        "Requests",
        "Requests to the store or disk, including retries.",
        "reqps",
        {"{{run}}": _rate("mcl_storage_requests_total", "run")},
    ),
    Panel(
        "Retries by reason",
        "Retried requests per second. Many retries mean that the store is overloaded or faulty.",
        "reqps",
        {"{{reason}}": _rate("mcl_storage_retries_total", "reason")},
        limit=1,
    ),
    Panel(
        "Retry ratio",
        "Share of requests that are retried. Above 5 %, an alert fires.",
        "percentunit",
        {"{{run}}": "run:mcl_storage_retries:ratio5m{@run}"},
        limit=0.05,
    ),
    Panel(
        "Read time by stage",
        "Seconds per second spent on reading, over all threads.",
        "none",
        {"{{stage}}": _rate("mcl_storage_seconds_total", "stage")},
        kind="stack",
    ),
    Panel(
        "Cache",
        "Shard cache (`data.cache`): hits, misses, evictions, and repairs of damaged shards, per second.",
        "cps",
        {
            event: f"sum(rate(mcl_storage_cache_{event}_total{{@rank}}[$__rate_interval]))"
            for event in ("hits", "misses", "evictions", "repairs")
        },
    ),
    DISK_FREE,
]

DATA = dashboard(
    "data",
    "Input pipeline: samples, their cost, and reads from the store.",
    "mcl_loader_samples_expected_total",
    {"Samples and batches": SAMPLES, "Cost": COST, "Store and cache": STORE},
    ("job", "run", "rank"),
)

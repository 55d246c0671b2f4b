"""Dashboard "builder": progress and errors of a shard set build."""

from monitoring.grafana.panels import Panel, dashboard


def _rate(counter: str, by: str = "run") -> str:
    return f"sum by ({by}) (rate({counter}{{@instance}}[$__rate_interval]))"


BUILD = [
    Panel(
        "Progress",
        "Share of the source videos that are stored or refused, including those of an earlier, interrupted build.",
        "percentunit",
        {"{{run}}": "run:mcl_build_done:ratio{@run}"},
        kind="stat",
        width=6,
        top=1,
    ),
    Panel(
        "Throughput",
        "Stored videos per second.",
        "cps",
        {"{{run}}": "run:mcl_build_videos:rate5m{@run}"},
        kind="stat",
        width=6,
    ),
    Panel(
        "Refused",
        "Share of refused videos over the last minutes.",
        "percentunit",
        {
            "{{run}}": f"{_rate('mcl_build_refused_total')} / "
            f"({_rate('mcl_build_videos_total')} + {_rate('mcl_build_refused_total')})"
        },
        limit=0.05,
        kind="stat",
        width=6,
        top=1,
    ),
    Panel(
        "Complete",
        "1 once the manifest is written; before that, the folder is not a shard set.",
        "none",
        {"{{run}}": "mcl_build_complete{@instance}"},
        kind="stat",
        width=6,
    ),
]

DETAILS = [
    Panel("Videos", "Stored videos per second.", "cps", {"{{run}}": _rate("mcl_build_videos_total")}),
    Panel("Frames", "Stored frames per second.", "cps", {"{{run}}": _rate("mcl_build_frames_total")}),
    Panel("Bytes", "Bytes written to the shard set per second.", "Bps", {"{{run}}": _rate("mcl_build_bytes_total")}),
    Panel(
        "Refused by reason",
        "Refused videos; `manifest.json` of the set lists them.",
        "none",
        {"{{reason}}": "sum by (reason) (increase(mcl_build_refused_total{@instance}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Retries by reason",
        "Retried requests to the store, per second.",
        "reqps",
        {"{{reason}}": _rate("mcl_build_retries_total", "reason")},
        limit=1,
    ),
    Panel(
        "CPU time of the builder",
        "CPU seconds per second of the process that writes the shards, without its workers.",
        "none",
        {"{{run}}": 'sum by (run) (rate(process_cpu_seconds_total{@instance,rank=""}[$__rate_interval]))'},
    ),
    Panel(
        "Memory of the builder",
        "Resident memory of the process that writes the shards.",
        "bytes",
        {"{{run}}": 'process_resident_memory_bytes{@instance,rank=""}'},
    ),
]

BUILDER = dashboard(
    "builder",
    "Build of a shard set: progress, throughput, refused videos and their reasons.",
    "mcl_build_videos_planned",
    {"Build": BUILD, "Details": DETAILS},
    ("job", "run", "instance"),
)

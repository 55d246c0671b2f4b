"""Dashboard "builder": videos on their way into a shard set."""

from __future__ import annotations

from monitoring.grafana.panels import Panel, dashboard


def _rate(counter: str, by: str = "run") -> str:
    return f"sum by ({by}) (rate({counter}{{@instance}}[$__rate_interval]))"


BUILD = [
    Panel(
        "Done",
        "Share of the videos that are stored, refused, or were stored by a build before.",
        "percentunit",
        {"{{run}}": "run:mcl_build_done:ratio{@run}"},
        kind="stat",
        width=6,
        top=1,
    ),
    Panel(
        "Pace",
        "Videos stored in a second.",
        "cps",
        {"{{run}}": "run:mcl_build_videos:rate5m{@run}"},
        kind="stat",
        width=6,
    ),
    Panel(
        "Refused",
        "Share of the videos that could not be used in the last minutes.",
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
        "1 once the manifest is written: before that, the folder is no shard set.",
        "none",
        {"{{run}}": "mcl_build_complete{@instance}"},
        kind="stat",
        width=6,
    ),
]

IMMUTABLE_KEYS = [
    Panel("Videos", "Stored in a second.", "cps", {"{{run}}": _rate("mcl_build_videos_total")}),
    Panel("Frames", "Stored in a second.", "cps", {"{{run}}": _rate("mcl_build_frames_total")}),
    Panel("Bytes", "Written to the shard set in a second.", "Bps", {"{{run}}": _rate("mcl_build_bytes_total")}),
    Panel(
        "Refused by reason",
        "Videos that could not be used; the set's `manifest.json` lists them.",
        "none",
        {"{{reason}}": "sum by (reason) (increase(mcl_build_refused_total{@instance}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Retries by reason",
        "Requests to the store that had to be made again.",
        "reqps",
        {"{{reason}}": _rate("mcl_build_retries_total", "reason")},
        limit=1,
    ),
    Panel(
        "CPU time of the builder",
        "CPU seconds in a second of the process that writes the shards, its workers not included.",
        "none",
        {"{{run}}": 'sum by (run) (rate(process_cpu_seconds_total{@instance,rank=""}[$__rate_interval]))'},
    ),
    Panel(
        "Memory of the builder",
        "Memory that the process which writes the shards holds.",
        "bytes",
        {"{{run}}": 'process_resident_memory_bytes{@instance,rank=""}'},
    ),
]

BUILDER = dashboard(
    "builder",
    "Videos on their way into a shard set: pace, what a video costs, what was refused and why.",
    "mcl_build_videos_planned",
    {"Build": BUILD, "Course": IMMUTABLE_KEYS},
    ("job", "run", "instance"),
)

"""Dashboard "reliability": what was lost, what could be, and what runs out."""

from __future__ import annotations

from monitoring.grafana.panels import DISK_FREE, HOST_MEMORY_FREE, Panel, dashboard

NOW = [
    Panel(
        "Alerts",
        "Alerts that fire now for the chosen runs; docs/runbook.md says what each asks for.",
        "none",
        {"alerts": 'sum(ALERTS{alertstate="firing",alertname=~"Mcl.*",@run}) or vector(0)'},
        limit=1,
        kind="stat",
        width=4,
    ),
    Panel(
        "Ranks that answer",
        "Share of the ranks whose exporter answered the last scrape.",
        "percentunit",
        {"{{run}}": "avg by (run) (up{@rank})"},
        limit=1,
        good="above",
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Goodput",
        "Share of the run's time that went into steps that count, restarts included.",
        "percentunit",
        {"{{run}}": "mcl_goodput_ratio{@run}"},
        limit=0.8,
        good="above",
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Last step",
        "Time since the rank that waits longest finished a step.",
        "s",
        {"{{run}}": "max by (run) (mcl_heartbeat_age_seconds{@run})"},
        limit=300,
        kind="stat",
        width=4,
    ),
    Panel(
        "Last checkpoint",
        "Time since the newest complete checkpoint: what a crash would cost now.",
        "s",
        {"{{run}}": "mcl_checkpoint_age_seconds{@run}"},
        limit=7200,
        kind="stat",
        width=4,
    ),
    Panel(
        "Asked to stop",
        "1 once the run was asked to stop: it saves and leaves.",
        "none",
        {"{{run}}": "mcl_stopping{@run}"},
        kind="stat",
        width=4,
    ),
]

LOSSES = [
    Panel(
        "Heartbeat",
        "Seconds since each rank's last step. One that grows alone hangs; all that grow wait for one that is gone.",
        "s",
        {"{{run}} {{rank}}": "mcl_heartbeat_age_seconds{@rank}"},
        limit=300,
    ),
    Panel(
        "Answering",
        "1 for each rank whose exporter answers.",
        "none",
        {"{{run}} {{rank}}": "up{@rank}"},
        limit=1,
        good="above",
    ),
    Panel(
        "Time lost by cause",
        "Seconds in a second of the last quarter of an hour that brought nothing.",
        "percentunit",
        {"{{cause}}": "sum by (cause) (run:mcl_lost:ratio15m{@run})"},
        kind="stack",
    ),
    Panel(
        "Restarts by cause",
        "Starts after the first, within the last hour, by what ended the run before.",
        "none",
        {"{{cause}}": "sum by (cause) (run:mcl_restarts:increase1h{@run})"},
        limit=1,
    ),
    Panel(
        "Productive time",
        "Share of the last quarter of an hour that went into steps that count, less what is to be repeated.",
        "percentunit",
        {"{{run}}": "run:mcl_productive:ratio15m{@run}"},
        limit=0.8,
        good="above",
        top=1,
    ),
]

CHECKPOINTS = [
    Panel(
        "Steps since the checkpoint",
        "Steps that a crash would cost now.",
        "none",
        {"{{run}}": "run:mcl_checkpoint_lag:steps{@run}"},
    ),
    Panel(
        "Time to write",
        "Seconds that the newest checkpoint took, and for how many of them training stood still.",
        "s",
        {
            "{{run}} in all": "mcl_checkpoint_seconds{@run}",
            "{{run}} standing still": "mcl_checkpoint_stall_seconds{@run}",
        },
    ),
    Panel("Size", "Bytes of the newest checkpoint.", "bytes", {"{{run}}": "mcl_checkpoint_bytes{@run}"}),
    Panel(
        "Written, failed, refused",
        "Checkpoints written, not written, and found unusable at a start.",
        "none",
        {
            what: f"sum(increase(mcl_checkpoints_{what}_total{{@run}}[$__rate_interval]))"
            for what in ("written", "failed", "refused")
        },
    ),
    Panel(
        "Failed in a row",
        "Checkpoints that could not be written since the last that could.",
        "none",
        {"{{run}}": "mcl_checkpoints_failed_in_a_row{@run}"},
        limit=1,
    ),
]

ROOM = [
    DISK_FREE,
    HOST_MEMORY_FREE,
    Panel(
        "Files open",
        "Share of the files that a rank's process may hold open.",
        "percentunit",
        {"{{run}} {{rank}}": "process_open_fds{@rank} / process_max_fds{@rank}"},
        limit=0.8,
        top=1,
    ),
]

RELIABILITY = dashboard(
    "reliability",
    "What runs have lost, what a crash would cost now, and what is about to run out.",
    "mcl_run_info",
    {"Now": NOW, "Losses": LOSSES, "CheckpointManager": CHECKPOINTS, "Room": ROOM},
    ("job", "run", "rank"),
)

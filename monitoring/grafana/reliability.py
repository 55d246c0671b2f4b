"""Dashboard "reliability": alerts, lost time, checkpoints and resources."""

from monitoring.grafana.panels import DISK_FREE, HOST_MEMORY_FREE, Panel, dashboard

NOW = [
    Panel(
        "Alerts",
        "Firing alerts of the selected runs; docs/how-to/runbook.md describes each of them.",
        "none",
        {"alerts": 'sum(ALERTS{alertstate="firing",alertname=~"Mcl.*",@run}) or vector(0)'},
        limit=1,
        kind="stat",
        width=4,
    ),
    Panel(
        "Ranks up",
        "Share of ranks whose metrics server answered the last scrape.",
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
        "Productive share of the run's time, including restarts.",
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
        "Longest time since a rank finished a step.",
        "s",
        {"{{run}}": "max by (run) (mcl_heartbeat_age_seconds{@run})"},
        limit=300,
        kind="stat",
        width=4,
    ),
    Panel(
        "Last checkpoint",
        "Age of the newest complete checkpoint: training time that a crash would lose now.",
        "s",
        {"{{run}}": "mcl_checkpoint_age_seconds{@run}"},
        limit=7200,
        kind="stat",
        width=4,
    ),
    Panel(
        "Stop requested",
        "1 after a stop request: the run saves a checkpoint and exits.",
        "none",
        {"{{run}}": "mcl_stopping{@run}"},
        kind="stat",
        width=4,
    ),
]

LOST_TIME = [
    Panel(
        "Heartbeat",
        "Time since each rank's last step. If it grows for one rank only, that rank hangs; if for all, they wait for a "
        "lost rank.",
        "s",
        {"{{run}} {{rank}}": "mcl_heartbeat_age_seconds{@rank}"},
        limit=300,
    ),
    Panel(
        "Up by rank",
        "1 for each rank whose metrics server answers.",
        "none",
        {"{{run}} {{rank}}": "up{@rank}"},
        limit=1,
        good="above",
    ),
    Panel(
        "Time lost by cause",
        "Unproductive share of the last 15 minutes.",
        "percentunit",
        {"{{cause}}": "sum by (cause) (run:mcl_lost:ratio15m{@run})"},
        kind="stack",
    ),
    Panel(
        "Restarts by cause",
        "Restarts in the last hour, by the cause of the previous exit.",
        "none",
        {"{{cause}}": "sum by (cause) (run:mcl_restarts:increase1h{@run})"},
        limit=1,
    ),
    Panel(
        "Productive time",
        "Productive share of the last 15 minutes, without steps that are repeated after a restart.",
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
        "Steps that a crash would lose now.",
        "none",
        {"{{run}}": "run:mcl_checkpoint_lag:steps{@run}"},
    ),
    Panel(
        "Write time",
        "Duration of writing the newest checkpoint, and the training pause within it.",
        "s",
        {
            "{{run}} total": "mcl_checkpoint_seconds{@run}",
            "{{run}} training pause": "mcl_checkpoint_stall_seconds{@run}",
        },
    ),
    Panel("Size", "Bytes of the newest checkpoint.", "bytes", {"{{run}}": "mcl_checkpoint_bytes{@run}"}),
    Panel(
        "Written, failed, refused",
        "Completed checkpoints, failed writes, and checkpoints that failed verification at a start.",
        "none",
        {
            outcome: f"sum(increase(mcl_checkpoints_{outcome}_total{{@run}}[$__rate_interval]))"
            for outcome in ("written", "failed", "refused")
        },
    ),
    Panel(
        "Failed in a row",
        "Consecutive failed checkpoint writes since the last completed one.",
        "none",
        {"{{run}}": "mcl_checkpoints_failed_in_a_row{@run}"},
        limit=1,
    ),
]

RESOURCES = [
    DISK_FREE,
    HOST_MEMORY_FREE,
    Panel(
        "Open files",
        "Open file descriptors of a rank as a share of its limit.",
        "percentunit",
        {"{{run}} {{rank}}": "process_open_fds{@rank} / process_max_fds{@rank}"},
        limit=0.8,
        top=1,
    ),
]

RELIABILITY = dashboard(
    "reliability",
    "Alerts, lost time, cost of a crash, checkpoints and resources.",
    "mcl_run_info",
    {"Now": NOW, "Lost time": LOST_TIME, "Checkpoints": CHECKPOINTS, "Resources": RESOURCES},
    ("job", "run", "rank"),
)

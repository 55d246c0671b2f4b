"""Write the files of a run folder."""

from __future__ import annotations

from pathlib import Path

from mcl_dist.events import Event
from mcl_dist.run_log.listeners import EventLog, MetricsFile


def write_events(folder: Path, *events: Event) -> None:
    """Append events to `metrics.jsonl` and `log.jsonl` of a run folder."""
    listeners = (MetricsFile(folder / "metrics.jsonl"), EventLog(folder / "log.jsonl"))
    for event in events:
        for listener in listeners:
            listener(event)

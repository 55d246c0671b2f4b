"""Processes of a run, found by their command lines."""

from __future__ import annotations

from pathlib import Path

from launch.supervision.processes import ProcessEntry


def pids_of_run(run: Path) -> list[int]:
    """Process ids of a run's command, launchers and ranks."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if f"run.dir={run}\0".encode() in ProcessEntry(pid).command]

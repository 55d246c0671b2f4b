"""The file by which Prometheus finds a run's ranks (`file_sd_configs`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mcl_dist.storage.folder import Folder

FILE = "targets.json"


@dataclass(frozen=True)
class ScrapeTarget:
    """Where one rank answers, and the labels that its series bear."""

    rank: int
    node: str
    host: str
    port: int


def write_targets(path: Path, targets: list[ScrapeTarget], run: str, *, tls: bool) -> None:
    """Tell Prometheus of a run's ranks; none, once it has ended in order: a target that is gone is an alarm.

    Raises:
        UserError: the file cannot be written.
    """
    groups = [
        {
            "targets": [f"[{each.host}]:{each.port}" if ":" in each.host else f"{each.host}:{each.port}"],
            "labels": {
                "run": run,
                "rank": str(each.rank),
                "node": each.node,
                **({"__scheme__": "https"} if tls else {}),
            },
        }
        for each in targets
    ]
    Folder(str(path.parent)).write(path.name, json.dumps(groups, indent=1).encode() + b"\n")

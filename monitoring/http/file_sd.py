"""Target file of a run for Prometheus's file-based service discovery (`file_sd_configs`)."""

import json
from dataclasses import dataclass
from pathlib import Path

from mcl_dist.storage.folder import Folder

TARGETS_FILE = "targets.json"


@dataclass(frozen=True)
class ScrapeTarget:
    """Address of one rank's metrics server, and the labels of its series."""

    rank: int
    node: str
    host: str
    port: int


def write_targets(path: Path, targets: list[ScrapeTarget], run: str, *, tls: bool) -> None:
    """Write the targets of a run; an empty list after an orderly end, because a missing target raises an alert.

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

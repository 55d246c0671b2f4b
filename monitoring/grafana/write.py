"""Writes the dashboards where Grafana's provisioning reads them: `python -m monitoring.grafana.write`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monitoring.grafana.builder import BUILDER
from monitoring.grafana.data import DATA
from monitoring.grafana.reliability import RELIABILITY
from monitoring.grafana.training import TRAINING

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (TRAINING, DATA, BUILDER, RELIABILITY)


def text_of(board: dict[str, Any]) -> str:
    """A dashboard's file."""
    return json.dumps(board, indent=1) + "\n"


def main() -> None:
    """Write a file a dashboard."""
    for board in DASHBOARDS:
        (FOLDER / f"{board['uid']}.json").write_text(text_of(board))


if __name__ == "__main__":
    main()

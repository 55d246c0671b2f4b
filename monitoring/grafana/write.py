"""Write the dashboards to the provisioning folder: `python -m monitoring.grafana.write`."""

import json
from pathlib import Path
from typing import Any

from monitoring.grafana.builder import BUILDER
from monitoring.grafana.data import DATA
from monitoring.grafana.reliability import RELIABILITY
from monitoring.grafana.training import TRAINING

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (TRAINING, DATA, BUILDER, RELIABILITY)


def dashboard_json(dashboard: dict[str, Any]) -> str:
    """Content of a dashboard's file."""
    return json.dumps(dashboard, indent=1) + "\n"


def main() -> None:
    """Write one file per dashboard."""
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard['uid']}.json").write_text(dashboard_json(dashboard))


if __name__ == "__main__":
    main()

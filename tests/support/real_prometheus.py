"""A real Prometheus with the shipped configuration and shortened times."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from launch.supervision.deepspeed_launcher import free_port
from launch.supervision.processes import wait_until
from tests.support.queries import MONITORING

SPEEDUP = 30  # two scrapes per second; an alert's `for: 2m` becomes four seconds
SCRAPE_SECONDS = 15 / SPEEDUP
MILLISECONDS = {"s": 1000, "m": 60_000, "h": 3_600_000}
Series = tuple[dict[str, str], dict[float, float]]


def speed_up(text: str) -> str:
    """Divide every time by SPEEDUP: durations (`15s`, `[5m]`), and numbers `* 60` or `* 3600`."""
    text = re.sub(r"\b(\d+)([smh])\b", lambda found: f"{int(found[1]) * MILLISECONDS[found[2]] // SPEEDUP}ms", text)
    return re.sub(r"\* (60|3600)\b", lambda found: f"* {int(found[1]) // SPEEDUP}", text)


def until(happened: Callable[[], bool], seconds: float) -> bool:
    """Poll until `happened()`; return False on timeout."""
    return wait_until(happened, seconds, poll_seconds=0.3)


class Prometheus:
    """A Prometheus server on the loopback with the shipped configuration; only ports, paths and times differ.

    Args:
        folder: working directory.
        ports: actual port for each port in the configuration files (build, loader bench, Pushgateway, …).

    Attributes:
        targets: folder for the target files of runs.
    """

    def __init__(self, folder: Path, ports: Mapping[int, int] | None = None) -> None:
        self.targets = folder / "targets"
        self.targets.mkdir(parents=True)
        actual_ports = defaultdict(free_port, ports or {})
        for file in (MONITORING / "prometheus").glob("*.yml"):
            text = re.sub(r":(9\d{3})\b", lambda found: f":{actual_ports[int(found[1])]}", file.read_text())
            (folder / file.name).write_text(speed_up(text))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._log = folder / "log"
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._start = time.time()
        try:
            assert until(self._answers, 30), self._log.read_text()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Terminate the server."""
        self._process.terminate()
        self._process.wait(30)

    def get(self, path: str, **parameters: str | float) -> Any:
        """Data of a response of its HTTP API."""
        with urlopen(f"{self._url}/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def series(self, query: str) -> list[Series]:
        """Labels and finite values by time of a query's series since the start, one point per scrape."""
        found = self.get("query_range", query=query, start=self._start, end=time.time(), step=SCRAPE_SECONDS)
        points = [(each["metric"], {at: float(value) for at, value in each["values"]}) for each in found["result"]]
        finite = [(labels, {at: value for at, value in x.items() if math.isfinite(value)}) for labels, x in points]
        return [(labels, values) for labels, values in finite if values]

    def firing(self) -> set[tuple[str, str]]:
        """Name and rank of every firing alert."""
        labels = [each["labels"] for each in self.get("alerts")["alerts"] if each["state"] == "firing"]
        return {(each["alertname"], each.get("rank", "")) for each in labels}

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            self.get("status/buildinfo")
        except URLError:
            return False
        return True

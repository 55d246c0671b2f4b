"""The metrics server of a group of one rank on a CPU."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from launch.supervision.deepspeed_launcher import free_port
from launch.telemetry.training import serve_training_metrics
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import RankError
from mcl_dist.events import StepDone
from monitoring.http.server import MonitoringConfig
from monitoring.metrics.training_metrics import TrainingMetrics

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
STEP = StepDone(
    step=1,
    epoch=0,
    total_steps=2,
    losses={"loss": 1.0},
    learning_rate=0.1,
    videos=4,
    seconds=1.0,
    data_wait_ratio=0.0,
    flops=1e12,
)


class Server:
    """A served run.

    Attributes:
        port: of the server.
        listener: of the run's events.
        targets_file: where the scrape targets are by default.
    """

    def __init__(self, port: int, listener: TrainingMetrics, targets_file: Path) -> None:
        self.port, self.listener, self.targets_file = port, listener, targets_file

    def get(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def series(self) -> dict[tuple[str, ...], float]:
        """Values by name and label values."""
        families = text_string_to_metric_families(self.get("/metrics"))
        return {(sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples}


@contextmanager
def served(
    run_folder: Path,
    *,
    folders: dict[str, str | None] | None = None,
    peak_tflops: float | None = None,
    targets: str = "",
) -> Iterator[Server]:
    run_folder.mkdir(exist_ok=True)
    config = MonitoringConfig(port=free_port(), peak_tflops=peak_tflops, targets=targets)
    assert config.port is not None
    with serve_training_metrics(config, ProcessGroup(), run_folder, folders or {}, "float32") as listener:
        yield Server(config.port, listener, run_folder / "targets.json")


def test_the_targets_file_names_the_rank_and_is_emptied_at_an_orderly_end(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        (group,) = json.loads(server.targets_file.read_text())
        assert group["targets"] == [f"127.0.0.1:{server.port}"]
        assert group["labels"] == {"run": "run", "rank": "0", "node": socket.gethostname()}
    assert json.loads(server.targets_file.read_text()) == []


def test_the_targets_file_keeps_the_rank_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), served(tmp_path / "run") as server:
        raise RuntimeError("out of memory")
    assert len(json.loads(server.targets_file.read_text())) == 1


def test_the_targets_file_can_be_configured(tmp_path: Path) -> None:
    with served(tmp_path / "run", targets=str(tmp_path / "run.json")) as server:
        assert len(json.loads((tmp_path / "run.json").read_text())) == 1
        assert not server.targets_file.exists()


def test_healthz_reports_the_last_step(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        server.listener(STEP)
        health = json.loads(server.get("/healthz"))
    assert (health["status"], health["step"]) == ("ok", 1)


def test_the_first_rank_serves_the_page_of_the_run(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        assert "<html" in server.get("/")


def test_the_metrics_cover_the_process_the_machine_and_the_run(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        server.listener(STEP)
        series = server.series()
    names = {name for name, *_ in series}
    assert {"process_cpu_seconds_total", "mcl_host_memory_size_bytes", "mcl_step"} <= names
    (info,) = (labels for name, *labels in series if name == "mcl_run_info")
    assert {torch.__version__, "float32", "cpu"} <= set(info)


def test_disks_of_local_folders_alone_are_measured(tmp_path: Path) -> None:
    folders = {"run": str(tmp_path), "cache": None, "checkpoint": "s3://bucket/checkpoints"}
    with served(tmp_path / "run", folders=folders) as server:
        series = server.series()
    assert {volume for name, *labels in series if name == "mcl_disk_size_bytes" for volume in labels} == {"run"}


def test_a_configured_peak_gives_the_flops_utilisation(tmp_path: Path) -> None:
    with served(tmp_path / "run", peak_tflops=2.0) as server:
        server.listener(STEP)
        assert server.series()["mcl_flops_peak_ratio",] == 0.5


def test_the_flops_utilisation_of_a_device_with_unknown_peak_is_absent(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        server.listener(STEP)
        assert ("mcl_flops_peak_ratio",) not in server.series()


def test_a_taken_port_is_an_error_of_the_rank(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = MonitoringConfig(port=holder.getsockname()[1])
        with (
            pytest.raises(RankError, match=re.escape(f"127.0.0.1:{config.port}")),
            serve_training_metrics(config, ProcessGroup(), tmp_path, {}, "float32"),
        ):
            pass
    assert not (tmp_path / "targets.json").exists()

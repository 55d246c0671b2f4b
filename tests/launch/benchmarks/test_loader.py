from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from launch.benchmarks.loader import loader_benchmark_config, measure_loader
from launch.cli.main import main
from launch.supervision.deepspeed_launcher import free_port
from launch.telemetry.batch_job_metrics import serve_or_push
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import update_loader_metrics

SMALL = ["data.crop=56", "data.frames=4", "data.stride=8"]


@pytest.fixture
def bench(synthetic_shards: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> dict[str, Any]:
        assert main(["bench", "loader", "--data", str(synthetic_shards), *arguments, *SMALL, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return run


def test_the_report_has_its_documented_fields(bench: Any) -> None:
    report = bench("--epochs", "2")

    assert report["videos"] == 32
    assert sum(report["stages"].values()) == pytest.approx(report["cpu_seconds_per_video"])
    for name in ("videos_per_second", "first_batch_seconds", "peak_rss_bytes", "bytes_decoded"):
        assert report[name] > 0
    assert report["bytes_read"] >= report["bytes_decoded"]
    assert "digest" not in report


@pytest.mark.slow
def test_the_digest_depends_on_the_batches_but_not_on_the_ranks(bench: Any) -> None:
    digest = bench("--fingerprint", "--epochs", "2")["digest"]

    assert bench("--fingerprint", "--epochs", "2", "--world-size", "4")["digest"] == digest
    assert bench("--fingerprint", "--epochs", "2", "run.seed=1")["digest"] != digest


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [("--epochs", "0", "--epochs: found 0"), ("--world-size", "3", "data.lanes|global_batch: found 16")],
)
def test_an_impossible_setting_is_rejected_in_one_line(
    synthetic_shards: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, found: str
) -> None:
    assert main(["bench", "loader", "--data", str(synthetic_shards), option, value, *SMALL]) == 2
    assert re.search(found, capsys.readouterr().err)


def test_a_remote_set_needs_no_cache_setting(synthetic_shards: Path, bench: Any) -> None:
    digest = bench("--fingerprint")["digest"]
    fsspec.filesystem("memory").put(str(synthetic_shards), "/bench", recursive=True)

    assert bench("--fingerprint", "--data", "memory://bench")["digest"] == digest


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a server thread may still serve a request at the end
def test_the_served_metrics_equal_the_report(synthetic_shards: Path, tmp_path: Path) -> None:
    registry, port = Registry(["rank"]), free_port()
    with serve_or_push(registry, port):
        report = measure_loader(
            loader_benchmark_config(str(synthetic_shards), None, SMALL, str(tmp_path)),
            epochs=2,
            num_ranks=1,
            device=torch.device("cpu"),
            fingerprint=False,
            on_report=lambda report: update_loader_metrics(registry, report),
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    served = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for name, value in {
        "mcl_loader_samples_delivered_total": report["videos"],
        "mcl_storage_bytes_read_total": report["bytes_read"],
        "mcl_storage_bytes_decoded_total": report["bytes_decoded"],
    }.items():
        assert float(served[name]) == value, name

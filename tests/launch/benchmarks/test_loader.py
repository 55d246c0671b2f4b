from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from launch.benchmarks.loader import benchmark_settings, measure_loader
from launch.cli.main import main
from launch.supervision.deepspeed_launcher import free_port
from launch.telemetry.batch_job_metrics import showing
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import show_loader

SMALL = ["data.crop=56", "data.frames=4", "data.stride=8"]


@pytest.fixture
def bench(synthetic_shards: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> dict[str, Any]:
        assert main(["bench", "loader", "--data", str(synthetic_shards), *arguments, *SMALL, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return run


def test_the_report_has_the_fields_that_tools_rely_on(bench: Any) -> None:
    report = bench("--epochs", "2")

    assert report["videos"] == 32
    assert sum(report["stages"].values()) == pytest.approx(report["cpu_seconds_per_video"])
    for name in ("videos_per_second", "first_batch_seconds", "peak_rss_bytes", "bytes_decoded"):
        assert report[name] > 0
    assert report["bytes_read"] >= report["bytes_decoded"]
    assert "digest" not in report


def test_the_digest_depends_on_the_batches_and_not_on_the_ranks(bench: Any) -> None:
    digest = bench("--fingerprint", "--epochs", "2")["digest"]

    assert bench("--fingerprint", "--epochs", "2", "--world-size", "4")["digest"] == digest
    assert bench("--fingerprint", "--epochs", "2", "run.seed=1")["digest"] != digest


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [("--epochs", "0", "--epochs: found 0"), ("--world-size", "3", "data.lanes|global_batch: found 16")],
)
def test_what_cannot_be_played_is_refused_in_one_line(
    synthetic_shards: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, found: str
) -> None:
    assert main(["bench", "loader", "--data", str(synthetic_shards), option, value, *SMALL]) == 2
    assert re.search(found, capsys.readouterr().err)


def test_a_set_elsewhere_needs_no_cache_of_its_own(synthetic_shards: Path, bench: Any) -> None:
    digest = bench("--fingerprint")["digest"]
    fsspec.filesystem("memory").put(str(synthetic_shards), "/bench", recursive=True)

    assert bench("--fingerprint", "--data", "memory://bench")["digest"] == digest


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a thread may be at a request when its server ends
def test_prometheus_is_told_what_the_report_says(synthetic_shards: Path, tmp_path: Path) -> None:
    board, port = Registry(["rank"]), free_port()
    with showing(board, port):
        report = measure_loader(
            benchmark_settings(str(synthetic_shards), None, SMALL, str(tmp_path)),
            epochs=2,
            num_ranks=1,
            device=torch.device("cpu"),
            fingerprint=False,
            listen=lambda report: show_loader(board, report),
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    seen = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for name, value in {
        "mcl_loader_samples_delivered_total": report["videos"],
        "mcl_storage_bytes_read_total": report["bytes_read"],
        "mcl_storage_bytes_decoded_total": report["bytes_decoded"],
    }.items():
        assert float(seen[name]) == value, name

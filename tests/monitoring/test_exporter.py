from __future__ import annotations

import math
import socket
import urllib.request

import pytest

from mcl_dist.errors import UserError
from mcl_dist.events import CheckpointWritten, LoaderReport, LossSpike, StepDone, StepSkipped
from monitoring.exporter import serve
from monitoring.metrics import TrainingMetrics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the server lives as long as the process
def test_a_scrape_shows_throughput_losses_waiting_and_checkpoints() -> None:
    metrics, port = TrainingMetrics(), free_port()
    serve(metrics.registry, port, "127.0.0.1")
    metrics(StepDone(3, 0, 10, {"loss": 2.5}, 0.01, videos=8, seconds=0.4, data_wait_ratio=0.25))
    metrics(CheckpointWritten(3, "there", 1.5, 0.1, 100))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    for line in (
        "mcl_videos_total 8.0",
        "mcl_step 3.0",
        "mcl_steps_planned 10.0",
        'mcl_step_seconds_bucket{le="0.5"} 1.0',
        "mcl_data_wait_ratio 0.25",
        "mcl_learning_rate 0.01",
        'mcl_objective{term="loss"} 2.5',
        "mcl_checkpoint_step 3.0",
        "mcl_checkpoint_seconds 1.5",
    ):
        assert line in lines


def test_skipped_steps_and_leaps_are_counted_and_leave_the_losses_as_they_were() -> None:
    metrics = TrainingMetrics()
    metrics(StepDone(3, 0, 10, {"loss": 2.5}, 0.01, videos=8, seconds=0.4, data_wait_ratio=0.25, gradient_norm=1.5))
    metrics(StepDone(4, 0, 10, {"loss": math.nan}, 0.01, 8, 0.4, 0.25, gradient_norm=math.inf, taken=False))
    metrics(StepSkipped(4, ["a video"], "a reason", 1))
    metrics(LossSpike(5, 9.0, 3.0, None))
    value = metrics.registry.get_sample_value
    assert value("mcl_objective", {"term": "loss"}) == 2.5
    assert value("mcl_gradient_norm") == 1.5
    assert value("mcl_steps_skipped_total") == 1
    assert value("mcl_steps_skipped_in_a_row") == 1
    assert value("mcl_loss_spikes_total", {"answer": "warned"}) == 1
    assert value("mcl_loss_spikes_total", {"answer": "rolled_back"}) == 0
    metrics(StepDone(5, 0, 10, {"loss": 2.0}, 0.01, 8, 0.4, 0.25))
    assert value("mcl_steps_skipped_in_a_row") == 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: .*monitoring.port"):
            serve(TrainingMetrics().registry, port, "127.0.0.1")


def test_what_feeds_a_run_is_exported_by_reason_and_stage() -> None:
    metrics = TrainingMetrics()
    storage = {"bytes_read": 70, "requests": 5, "retries": {"stall": 2}}
    report = LoaderReport(20, 19, 1, {"checksum": 1}, 0.5, 2, {"decode": 1.5}, storage, 0.0, 0)

    assert metrics.registry.get_sample_value("mcl_loader_samples_expected_total") is None
    metrics(report)

    expected = {
        ("mcl_loader_samples_expected_total",): 20,
        ("mcl_loader_samples_replaced_total",): 1,
        ("mcl_loader_samples_unaccounted",): 0,
        ("mcl_loader_queue_batches",): 2,
        ("mcl_loader_wait_seconds_total",): 0.5,
        ("mcl_loader_bad_samples_total", "reason", "checksum"): 1,
        ("mcl_loader_stage_cpu_seconds_total", "stage", "decode"): 1.5,
        ("mcl_storage_bytes_read_total",): 70,
        ("mcl_storage_retries_total", "reason", "stall"): 2,
    }
    for (name, *label), value in expected.items():
        assert metrics.registry.get_sample_value(name, {label[0]: label[1]} if label else {}) == value, name

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from mcl_dist.events import (
    PHASES,
    Accounts,
    CheckpointFailed,
    CheckpointRefused,
    CheckpointWritten,
    Evaluated,
    Evaluating,
    LoaderReport,
    LossSpike,
    Started,
    StepDone,
    StepSkipped,
    Stopping,
)
from mcl_dist.run_log.goodput import RESTART_CAUSES
from monitoring.http.healthz import Healthz
from monitoring.metrics.catalogue import LOSSES, Scope
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import TrainingMetrics

DONE = StepDone(
    step=3,
    epoch=0,
    total_steps=10,
    losses={"loss": 2.5, "loss_inter": 2.0, "similarity_positive": 0.5},
    learning_rate=0.01,
    videos=8,
    seconds=0.4,
    data_wait_ratio=0.25,
    gradient_norm=1.5,
    phases=dict.fromkeys(PHASES, 0.06),
    momentum=0.99,
    queue_fill=0.5,
    queue_age=4.0,
    flops=2e9,
)


def make_metrics(*scopes: Scope, peak_flops: float | None = None) -> tuple[TrainingMetrics, CollectorRegistry]:
    collectors, registry = CollectorRegistry(), Registry(scopes or ("run", "rank", "node"))
    collectors.register(registry)
    return TrainingMetrics(registry, Healthz(600.0), peak_flops), collectors


def test_an_evaluation_exports_its_scores_and_counts_as_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, collectors = make_metrics()
    now = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: now)
    metrics(Evaluating(3, 20, 60))
    assert collectors.get_sample_value("mcl_heartbeat_age_seconds") == 0
    assert collectors.get_sample_value("mcl_evaluation_step") is None
    metrics(Evaluated(3, {"top1": 0.5, "top5": 0.75, "mean_class": 0.25}, 12.0))
    for name, expected in (("top1", 0.5), ("top5", 0.75)):
        assert collectors.get_sample_value("mcl_knn_accuracy_ratio", {"measure": name}) == expected
    assert collectors.get_sample_value("mcl_evaluation_step") == 3
    assert collectors.get_sample_value("mcl_evaluation_seconds") == 12


def test_a_step_exports_its_results_and_its_phases() -> None:
    metrics, collectors = make_metrics(peak_flops=1e10)
    metrics(DONE)
    metrics(CheckpointWritten(3, "there", 1.5, 0.25, 4000))
    value = collectors.get_sample_value
    for name, expected in {
        "mcl_videos_total": 8,
        "mcl_step": 3,
        "mcl_steps_planned": 10,
        "mcl_learning_rate": 0.01,
        "mcl_momentum": 0.99,
        "mcl_queue_fill_ratio": 0.5,
        "mcl_queue_age_steps": 4,
        "mcl_data_wait_ratio": 0.25,
        "mcl_flops_total": 2e9,
        "mcl_flops_per_second": 5e9,
        "mcl_flops_peak_ratio": 0.5,
        "mcl_step_seconds_count": 1,
        "mcl_checkpoint_step": 3,
        "mcl_checkpoint_seconds": 1.5,
        "mcl_checkpoint_stall_seconds": 0.25,
        "mcl_checkpoint_bytes": 4000,
    }.items():
        assert value(name) == pytest.approx(expected), name
    assert value("mcl_loss", {"term": "total"}) == 2.5
    assert value("mcl_loss", {"term": "inter"}) == 2.0
    assert value("mcl_similarity", {"term": "positive"}) == 0.5
    assert value("mcl_step_seconds_bucket", {"le": "0.5"}) == 1
    assert value("mcl_step_seconds_bucket", {"le": "0.2"}) == 0
    assert value("mcl_step_phase_seconds_sum", {"phase": "keys"}) == pytest.approx(0.06)


def test_skipped_steps_and_loss_spikes_are_counted_and_keep_the_last_losses() -> None:
    metrics, collectors = make_metrics()
    metrics(DONE)
    metrics(replace(DONE, losses={"loss": math.nan}, gradient_norm=math.inf, taken=False))
    metrics(StepSkipped(4, ["a video"], "a reason", 1))
    metrics(LossSpike(5, 9.0, 3.0, None))
    value = collectors.get_sample_value
    assert value("mcl_loss", {"term": "total"}) == 2.5
    assert value("mcl_gradient_norm") == 1.5
    assert value("mcl_steps_skipped_total") == 1
    assert value("mcl_steps_skipped_in_a_row") == 1
    assert value("mcl_loss_spikes_total", {"answer": "warned"}) == 1
    assert value("mcl_loss_spikes_total", {"answer": "rolled_back"}) == 0
    metrics(DONE)
    assert value("mcl_steps_skipped_in_a_row") == 0


def test_failed_and_refused_checkpoints_are_counted() -> None:
    metrics, collectors = make_metrics()
    value = collectors.get_sample_value
    metrics(CheckpointFailed(5, "there", "no space", 2))
    metrics(CheckpointRefused("there", "torn"))
    assert value("mcl_checkpoints_failed_total") == 1
    assert value("mcl_checkpoints_failed_in_a_row") == 2
    assert value("mcl_checkpoints_refused_total") == 1
    metrics(CheckpointWritten(6, "there", 1.5, 0.25, 4000))
    assert value("mcl_checkpoints_failed_in_a_row") == 0


@pytest.mark.parametrize(("step", "resumed_from"), [(0, None), (40, "there")])
def test_before_the_first_checkpoint_the_checkpoint_step_is_the_step_at_the_start(
    step: int, resumed_from: str | None
) -> None:
    metrics, collectors = make_metrics()
    metrics(Started(step, 60, resumed_from))
    assert collectors.get_sample_value("mcl_step") == step
    assert collectors.get_sample_value("mcl_checkpoint_step") == step
    metrics(CheckpointWritten(step + 10, "there", 1.5, 0.25, 4000))
    assert collectors.get_sample_value("mcl_checkpoint_step") == step + 10


def test_loader_metrics_are_exported_by_reason_and_stage() -> None:
    metrics, collectors = make_metrics()
    value = collectors.get_sample_value
    storage = {"bytes_read": 70, "requests": 5, "retries": {"stall": 2}}
    metrics(LoaderReport(20, 19, 1, {"checksum": 1}, 0.5, 2, {"decode": 1.5}, storage, 0.0, 0))
    for (name, *label), expected in {
        ("mcl_loader_samples_expected_total",): 20,
        ("mcl_loader_samples_replaced_total",): 1,
        ("mcl_loader_samples_unaccounted",): 0,
        ("mcl_loader_queue_batches",): 2,
        ("mcl_loader_wait_seconds_total",): 0.5,
        ("mcl_loader_bad_samples_total", "reason", "checksum"): 1,
        ("mcl_loader_bad_samples_total", "reason", "decode"): 0,
        ("mcl_loader_stage_cpu_seconds_total", "stage", "decode"): 1.5,
        ("mcl_storage_bytes_read_total",): 70,
        ("mcl_storage_retries_total", "reason", "stall"): 2,
    }.items():
        assert value(name, {label[0]: label[1]} if label else {}) == expected, name


def test_counters_start_at_zero_for_every_label_value() -> None:
    _, collectors = make_metrics()
    assert collectors.get_sample_value("mcl_storage_retries_total", {"reason": "stall"}) == 0
    assert collectors.get_sample_value("mcl_steps_skipped_total") == 0


def test_totals_over_all_restarts_are_absent_until_known_and_then_exported_for_every_cause() -> None:
    metrics, collectors = make_metrics()
    totals = {f"mcl_{name}_total" for name in ("restarts", "run_seconds", "productive_seconds", "lost_seconds")}

    def exported() -> set[str]:
        return totals & {sample.name for family in collectors.collect() for sample in family.samples}

    metrics(Started(40, 60, "there"))
    assert exported() == set()
    metrics(Accounts(0.9, 100.0, 90.0, {"starting": 10.0}, {"hang": 2}))
    assert exported() == totals
    value = collectors.get_sample_value
    assert {cause: value("mcl_restarts_total", {"cause": cause}) for cause in RESTART_CAUSES} == {
        **dict.fromkeys(RESTART_CAUSES, 0),
        "hang": 2,
    }
    assert {cause: value("mcl_lost_seconds_total", {"cause": cause}) for cause in LOSSES} == {
        **dict.fromkeys(LOSSES, 0),
        "starting": 10,
    }


def test_unlisted_label_values_are_exported_as_other() -> None:
    metrics, collectors = make_metrics()
    reasons = {"unlisted": 1, "unlisted too": 2}
    metrics(LoaderReport(20, 19, 1, reasons, 0.5, 2, {}, {}, 0.0, 0))
    assert collectors.get_sample_value("mcl_loader_bad_samples_total", {"reason": "other"}) == 3


def test_only_rank_0_exports_metrics_of_the_whole_run() -> None:
    metrics, collectors = make_metrics("rank")
    metrics(DONE)
    assert collectors.get_sample_value("mcl_videos_total") is None
    assert collectors.get_sample_value("mcl_step_seconds_count") == 1


def test_heartbeat_and_checkpoint_ages_restart_at_each_step_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    metrics, collectors = make_metrics()
    metrics(CheckpointWritten(3, "there", 1.5, 0.25, 4000))
    now = 107.0
    metrics(DONE)
    now = 109.0
    assert collectors.get_sample_value("mcl_heartbeat_age_seconds") == 2.0
    assert collectors.get_sample_value("mcl_checkpoint_age_seconds") == 9.0


def test_goodput_metrics_show_lost_time_and_restarts_by_cause() -> None:
    metrics, collectors = make_metrics()
    metrics(Accounts(0.75, 400.0, 300.0, {"starting": 60.0, "killed": 30.0, "unlisted": 10.0}, {"killed": 2}))
    metrics(Stopping(7, "a request"))
    value = collectors.get_sample_value
    assert value("mcl_goodput_ratio") == 0.75
    assert value("mcl_run_seconds_total") == 400.0
    assert value("mcl_productive_seconds_total") == 300.0
    assert value("mcl_lost_seconds_total", {"cause": "killed"}) == 30.0
    assert value("mcl_lost_seconds_total", {"cause": "other"}) == 10.0
    assert value("mcl_restarts_total", {"cause": "killed"}) == 2
    assert value("mcl_stopping") == 1

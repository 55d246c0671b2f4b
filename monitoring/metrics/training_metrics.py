"""Listener that turns the events of a run into metrics of the catalogue."""

import time

from mcl_dist.events import (
    Accounts,
    CheckpointFailed,
    CheckpointRefused,
    CheckpointWritten,
    Evaluated,
    Evaluating,
    Event,
    LoaderReport,
    LossSpike,
    Started,
    StepDone,
    StepSkipped,
    Stopping,
)
from mcl_dist.run_log.goodput import RESTART_CAUSES
from monitoring.http.healthz import Healthz
from monitoring.metrics.catalogue import LOSSES
from monitoring.metrics.registry import Registry

STORAGE_COUNTS = (
    "bytes_read", "bytes_decoded", "requests", "cache_hits", "cache_misses", "cache_evictions", "cache_repairs"
)  # fmt: skip


class TrainingMetrics:
    """Listener that updates the metrics of a rank.

    Args:
        registry: exports the metrics; it ignores those outside the rank's scopes.
        healthz: gets a beat with every step.
        peak_flops: peak FLOP/s of all ranks' devices together, if known.
    """

    def __init__(self, registry: Registry, healthz: Healthz, peak_flops: float | None = None) -> None:
        self._registry = registry
        self._healthz = healthz
        self._peak_flops = peak_flops
        self._last_checkpoint = time.monotonic()
        registry.before_scrape(self._update_ages)

    def __call__(self, event: Event) -> None:
        """Update the metrics that the event changes, visible at once."""
        with self._registry.atomic():
            self._update(event)

    def _update(self, event: Event) -> None:
        registry = self._registry
        match event:
            case Started(step, total_steps):
                self._healthz.beat(step)
                registry.set("mcl_step", step)
                registry.set("mcl_checkpoint_step", step)
                registry.set("mcl_steps_planned", total_steps)
                registry.set("mcl_stopping", 0)
            case StepDone():
                self._healthz.beat(event.step)
                self._update_step(event)
            case StepSkipped() | LossSpike():
                self._count_anomaly(event)
            case LoaderReport():
                update_loader_metrics(self._registry, event)
            case CheckpointWritten():
                self._update_checkpoint(event)
            case CheckpointFailed() | CheckpointRefused():
                self._count_failed_checkpoint(event)
            case Evaluating() | Evaluated():
                self._healthz.beat(event.step)
                self._update_evaluation(event)
            case Stopping():
                registry.set("mcl_stopping", 1)
            case Accounts():
                self._update_goodput(event)

    def _update_step(self, done: StepDone) -> None:
        registry = self._registry
        registry.add("mcl_videos_total", done.videos)
        registry.set("mcl_step", done.step)
        registry.set("mcl_steps_planned", done.total_steps)
        registry.set("mcl_epoch", done.epoch)
        registry.observe("mcl_step_seconds", done.seconds)
        for phase, seconds in done.phases.items():
            registry.observe("mcl_step_phase_seconds", seconds, phase)
        registry.set("mcl_data_wait_ratio", done.data_wait_ratio)
        registry.set("mcl_learning_rate", done.learning_rate)
        registry.set("mcl_momentum", done.momentum)
        registry.set("mcl_queue_fill_ratio", done.queue_fill)
        registry.set("mcl_queue_age_steps", done.queue_age)
        registry.add("mcl_flops_total", done.flops)
        registry.set("mcl_flops_per_second", done.flops / done.seconds)
        if self._peak_flops:
            registry.set("mcl_flops_peak_ratio", done.flops / done.seconds / self._peak_flops)
        if done.taken:
            registry.set("mcl_steps_skipped_in_a_row", 0)
            registry.set("mcl_gradient_norm", done.gradient_norm)
            for name, value in done.losses.items():
                metric, _, term = name.partition("_")
                registry.set(f"mcl_{metric}", value, term or "total")

    def _update_checkpoint(self, written: CheckpointWritten) -> None:
        registry, self._last_checkpoint = self._registry, time.monotonic()
        registry.add("mcl_checkpoints_written_total")
        registry.set("mcl_checkpoints_failed_in_a_row", 0)
        registry.set("mcl_checkpoint_step", written.step)
        registry.set("mcl_checkpoint_seconds", written.seconds)
        registry.set("mcl_checkpoint_stall_seconds", written.stall_seconds)
        registry.set("mcl_checkpoint_bytes", written.bytes)

    def _count_failed_checkpoint(self, event: CheckpointFailed | CheckpointRefused) -> None:
        if isinstance(event, CheckpointRefused):
            self._registry.add("mcl_checkpoints_refused_total")
        else:
            self._registry.add("mcl_checkpoints_failed_total")
            self._registry.set("mcl_checkpoints_failed_in_a_row", event.in_a_row)

    def _count_anomaly(self, event: StepSkipped | LossSpike) -> None:
        if isinstance(event, StepSkipped):
            self._registry.add("mcl_steps_skipped_total")
            self._registry.set("mcl_steps_skipped_in_a_row", event.in_a_row)
        else:
            answer = "warned" if event.rolled_back_to is None else "rolled_back"
            self._registry.add("mcl_loss_spikes_total", 1, answer)

    def _update_evaluation(self, event: Evaluating | Evaluated) -> None:
        if isinstance(event, Evaluated):
            self._registry.update("mcl_knn_accuracy_ratio", event.scores)
            self._registry.set("mcl_evaluation_step", event.step)
            self._registry.set("mcl_evaluation_seconds", event.seconds)

    def _update_goodput(self, accounts: Accounts) -> None:
        registry = self._registry
        registry.set("mcl_goodput_ratio", accounts.goodput)
        registry.set("mcl_run_seconds_total", accounts.wall_seconds)
        registry.set("mcl_productive_seconds_total", accounts.productive_seconds)
        registry.update("mcl_lost_seconds_total", dict.fromkeys(LOSSES, 0.0) | accounts.lost_seconds)
        registry.update("mcl_restarts_total", dict.fromkeys(RESTART_CAUSES, 0) | accounts.restarts)

    def _update_ages(self) -> None:
        self._registry.set("mcl_heartbeat_age_seconds", self._healthz.age)
        self._registry.set("mcl_checkpoint_age_seconds", time.monotonic() - self._last_checkpoint)


def update_loader_metrics(registry: Registry, report: LoaderReport) -> None:
    """Set the loader and storage metrics to a loader's totals since its start."""
    storage = report.storage
    with registry.atomic():
        for name in ("expected", "delivered", "replaced"):
            registry.set(f"mcl_loader_samples_{name}_total", getattr(report, name))
        registry.set("mcl_loader_samples_unaccounted", report.expected - report.delivered - report.replaced)
        registry.update("mcl_loader_bad_samples_total", report.bad_samples)
        registry.set("mcl_loader_queue_batches", report.queue)
        registry.set("mcl_loader_wait_seconds_total", report.waited_seconds)
        registry.update("mcl_loader_stage_cpu_seconds_total", report.stages)
        registry.set("mcl_loader_worker_cpu_seconds_total", report.worker_cpu_seconds)
        registry.set("mcl_loader_worker_peak_bytes", report.worker_peak_bytes)
        for name in STORAGE_COUNTS:
            registry.set(f"mcl_storage_{name}_total", storage.get(name, 0))
        registry.update("mcl_storage_retries_total", storage.get("retries", {}))
        registry.update("mcl_storage_seconds_total", storage.get("seconds", {}))

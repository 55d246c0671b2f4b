"""From the events of a run to the metrics of the catalogue."""

from __future__ import annotations

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
from mcl_dist.run_log.goodput import CAUSES
from monitoring.http.healthz import Healthz
from monitoring.metrics.catalogue import LOSSES
from monitoring.metrics.registry import Registry

STORAGE_COUNTS = (
    "bytes_read", "bytes_decoded", "requests", "cache_hits", "cache_misses", "cache_evictions", "cache_repairs"
)  # fmt: skip


class TrainingMetrics:
    """A listener that shows on a board what a rank hears.

    Args:
        board: where; it shows only what the rank's scopes hold.
        pulse: beats with every step.
        peak_flops: floating-point operations a second that all ranks' devices can do at most, where it is known.
    """

    def __init__(self, board: Registry, pulse: Healthz, peak_flops: float | None = None) -> None:
        self._board = board
        self._pulse = pulse
        self._peak_flops = peak_flops
        self._saved = time.monotonic()
        board.before_scrape(self._ages)

    def __call__(self, event: Event) -> None:
        """Count what happened."""
        with self._board.at_once():
            self._show(event)

    def _show(self, event: Event) -> None:
        board = self._board
        match event:
            case Started(step, total_steps):
                self._pulse.beat(step)
                board.set("mcl_step", step)
                board.set("mcl_checkpoint_step", step)
                board.set("mcl_steps_planned", total_steps)
                board.set("mcl_stopping", 0)
            case StepDone():
                self._pulse.beat(event.step)
                self._step(event)
            case StepSkipped() | LossSpike():
                self._mishap(event)
            case LoaderReport():
                show_loader(self._board, event)
            case CheckpointWritten():
                self._checkpoint(event)
            case CheckpointFailed() | CheckpointRefused():
                self._no_checkpoint(event)
            case Evaluating() | Evaluated():
                self._pulse.beat(event.step)
                self._evaluation(event)
            case Stopping():
                board.set("mcl_stopping", 1)
            case Accounts():
                self._accounts(event)

    def _step(self, done: StepDone) -> None:
        board = self._board
        board.add("mcl_videos_total", done.videos)
        board.set("mcl_step", done.step)
        board.set("mcl_steps_planned", done.total_steps)
        board.set("mcl_epoch", done.epoch)
        board.observe("mcl_step_seconds", done.seconds)
        for phase, seconds in done.phases.items():
            board.observe("mcl_step_phase_seconds", seconds, phase)
        board.set("mcl_data_wait_ratio", done.data_wait_ratio)
        board.set("mcl_learning_rate", done.learning_rate)
        board.set("mcl_momentum", done.momentum)
        board.set("mcl_queue_fill_ratio", done.queue_fill)
        board.set("mcl_queue_age_steps", done.queue_age)
        board.add("mcl_flops_total", done.operations)
        board.set("mcl_flops_per_second", done.operations / done.seconds)
        if self._peak_flops:
            board.set("mcl_flops_peak_ratio", done.operations / done.seconds / self._peak_flops)
        if not done.taken:
            return
        board.set("mcl_steps_skipped_in_a_row", 0)
        board.set("mcl_gradient_norm", done.gradient_norm)
        for name, value in done.losses.items():
            what, _, term = name.partition("_")
            board.set(f"mcl_{what}", value, term or "total")

    def _checkpoint(self, written: CheckpointWritten) -> None:
        board, self._saved = self._board, time.monotonic()
        board.add("mcl_checkpoints_written_total")
        board.set("mcl_checkpoints_failed_in_a_row", 0)
        board.set("mcl_checkpoint_step", written.step)
        board.set("mcl_checkpoint_seconds", written.seconds)
        board.set("mcl_checkpoint_stall_seconds", written.stall_seconds)
        board.set("mcl_checkpoint_bytes", written.bytes)

    def _no_checkpoint(self, event: CheckpointFailed | CheckpointRefused) -> None:
        if isinstance(event, CheckpointRefused):
            self._board.add("mcl_checkpoints_refused_total")
        else:
            self._board.add("mcl_checkpoints_failed_total")
            self._board.set("mcl_checkpoints_failed_in_a_row", event.in_a_row)

    def _mishap(self, event: StepSkipped | LossSpike) -> None:
        if isinstance(event, StepSkipped):
            self._board.add("mcl_steps_skipped_total")
            self._board.set("mcl_steps_skipped_in_a_row", event.in_a_row)
        else:
            answer = "warned" if event.rolled_back_to is None else "rolled_back"
            self._board.add("mcl_loss_spikes_total", 1, answer)

    def _evaluation(self, found: Evaluating | Evaluated) -> None:
        if isinstance(found, Evaluating):
            return
        self._board.update("mcl_knn_accuracy_ratio", found.scores)
        self._board.set("mcl_evaluation_step", found.step)
        self._board.set("mcl_evaluation_seconds", found.seconds)

    def _accounts(self, accounts: Accounts) -> None:
        board = self._board
        board.set("mcl_goodput_ratio", accounts.goodput)
        board.set("mcl_run_seconds_total", accounts.wall_seconds)
        board.set("mcl_productive_seconds_total", accounts.productive_seconds)
        board.update("mcl_lost_seconds_total", dict.fromkeys(LOSSES, 0.0) | accounts.lost_seconds)
        board.update("mcl_restarts_total", dict.fromkeys(CAUSES, 0) | accounts.restarts)

    def _ages(self) -> None:
        self._board.set("mcl_heartbeat_age_seconds", self._pulse.age)
        self._board.set("mcl_checkpoint_age_seconds", time.monotonic() - self._saved)


def show_loader(board: Registry, report: LoaderReport) -> None:
    """Show what a loader has done since it began."""
    storage = report.storage
    with board.at_once():
        for name in ("expected", "delivered", "replaced"):
            board.set(f"mcl_loader_samples_{name}_total", getattr(report, name))
        board.set("mcl_loader_samples_unaccounted", report.expected - report.delivered - report.replaced)
        board.update("mcl_loader_bad_samples_total", report.bad_samples)
        board.set("mcl_loader_queue_batches", report.queue)
        board.set("mcl_loader_wait_seconds_total", report.waited_seconds)
        board.update("mcl_loader_stage_cpu_seconds_total", report.stages)
        board.set("mcl_loader_worker_cpu_seconds_total", report.worker_cpu_seconds)
        board.set("mcl_loader_worker_peak_bytes", report.worker_peak_bytes)
        for name in STORAGE_COUNTS:
            board.set(f"mcl_storage_{name}_total", storage.get(name, 0))
        board.update("mcl_storage_retries_total", storage.get("retries", {}))
        board.update("mcl_storage_seconds_total", storage.get("seconds", {}))

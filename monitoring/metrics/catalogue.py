"""Catalogue of the exported Prometheus metrics: name, type, unit, labels, help; source of `docs/reference/metrics.md`.

The label values are listed here; an unlisted value becomes `other`, so the number of series is bounded. Prometheus adds
the labels `run`, `rank` and `node` from `targets.json`.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from mcl_dist.events import BAD_SAMPLE_REASONS, LOADER_STAGES, PHASES, REFUSAL_REASONS
from mcl_dist.run_log.goodput import RESTART_CAUSES
from mcl_dist.run_log.listeners import SCORE_LABELS
from mcl_dist.storage.store_requests import Failure

Kind = Literal["counter", "gauge", "histogram"]
# The exporter of a metric: rank 0 for the whole run, every rank, the first rank of each node, or a build.
Scope = Literal["run", "rank", "node", "build"]

STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PHASE_SECONDS = (0.005, 0.01, 0.02, *STEP_SECONDS)
RETRIES: tuple[str, ...] = get_args(Failure)
LOSSES = ("starting", "checkpoint", "evaluation", "skipped", *RESTART_CAUSES)
VOLUMES = ("run", "cache", "checkpoint")
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: exported name; for a histogram without `_bucket`.
        unit: base unit, empty for none.
        labels, values: label and its values besides `other`; with several labels, no values are listed and a process
            exports one combination.
        buckets: upper bounds of a histogram.
        spans_restarts: the counter continues over all starts of a run; a process must restore its value first.
    """

    name: str
    kind: Kind
    scope: Scope
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    spans_restarts: bool = False

    @property
    def series(self) -> int:
        """Largest number of series of one process, without `other`."""
        per_label = len(self.buckets) + 3 if self.kind == "histogram" else 1  # +Inf bucket, sum and count
        return per_label * max(1, len(self.values))


def _gauge(name: str, scope: Scope, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "gauge", scope, unit, text, (label,) if label else (), values)


def _counter(name: str, scope: Scope, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "counter", scope, unit, text, (label,) if label else (), values)


def _run_total(name: str, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return replace(_counter(name, "run", unit, text, label, values), spans_restarts=True)


TRAINING = (
    Metric("mcl_run_info", "gauge", "rank", "", "Constant 1; the labels describe the run.",
           ("version", "torch", "precision", "device")),
    _counter("mcl_videos_total", "run", "videos", "Videos consumed by training, over all ranks."),
    _gauge("mcl_step", "run", "steps", "Completed steps."),
    _gauge("mcl_steps_planned", "run", "steps", "Planned steps of the whole run."),
    _gauge("mcl_epoch", "run", "epochs", "Epoch of the last step, counted from 0."),
    Metric("mcl_step_seconds", "histogram", "rank", "seconds", "Step time (wall time), including data wait.",
           buckets=STEP_SECONDS),
    Metric("mcl_step_phase_seconds", "histogram", "rank", "seconds",
           "Step time by phase, on a GPU measured by CUDA events; `wait` and `keys` are the rank's own time, the other "
           "phases include waiting for other ranks.",
           ("phase",), PHASES, PHASE_SECONDS),
    _gauge("mcl_data_wait_ratio", "run", "ratio", "Data wait of the last step as a share of its time, mean over "
           "ranks."),
    _gauge("mcl_loss", "run", "nats", "Loss terms of the last applied step, unweighted, mean over ranks; `total` is "
           "the weighted sum.", "term", ("total", "inter", "intra", "alignment", "order")),
    _gauge("mcl_similarity", "run", "", "Mean cosine similarity to positives, to negatives, and between alignment map "
           "and motion target.", "term", ("positive", "negative", "alignment")),
    _gauge("mcl_knn_accuracy_ratio", "run", "ratio", "Accuracy of the last online kNN evaluation on held-out videos; "
           "absent without `evaluate.every`.", "measure", tuple(SCORE_LABELS)),
    _gauge("mcl_evaluation_step", "run", "steps", "Step of the last online kNN evaluation."),
    _gauge("mcl_evaluation_seconds", "run", "seconds", "Training pause for the last online kNN evaluation."),
    _gauge("mcl_gradient_norm", "run", "", "Gradient norm of the last applied step."),
    _gauge("mcl_learning_rate", "run", "", "Learning rate of the last step."),
    _gauge("mcl_momentum", "run", "ratio", "Momentum of the key encoder in the last step."),
    _gauge("mcl_queue_fill_ratio", "run", "ratio", "Share of the negative queue that holds keys of this run."),
    _gauge("mcl_queue_age_steps", "run", "steps", "Age of the oldest key in the negative queue."),
    _counter("mcl_steps_skipped_total", "run", "steps", "Skipped steps: loss or gradient was not finite, and no "
             "parameter was updated."),
    _gauge("mcl_steps_skipped_in_a_row", "run", "steps", "Consecutive skipped steps since the last applied one."),
    _counter("mcl_loss_spikes_total", "run", "steps", "Loss spikes, by the response to them.", "answer",
             ("warned", "rolled_back")),
    _counter("mcl_flops_total", "run", "operations", "Floating-point operations of all steps, over all ranks: "
             "convolutions and matrix products."),
    _gauge("mcl_flops_per_second", "run", "operations/second", "Floating-point operations per second in the last step, "
           "over all ranks."),
    _gauge("mcl_flops_peak_ratio", "run", "ratio", "Model FLOPs utilisation: `mcl_flops_per_second` as a share of the "
           "devices' peak; absent where the peak is unknown."),
)  # fmt: skip

LOADER = (
    _counter("mcl_loader_samples_expected_total", "rank", "samples", "Samples requested by the steps so far."),
    _counter("mcl_loader_samples_delivered_total", "rank", "samples", "Requested samples that were delivered."),
    _counter("mcl_loader_samples_replaced_total", "rank", "samples", "Requested samples that were bad and replaced by "
             "others."),
    _gauge("mcl_loader_samples_unaccounted", "rank", "samples", "Requested samples that were neither delivered nor "
           "replaced; always 0 in a correct loader."),
    _counter("mcl_loader_bad_samples_total", "rank", "samples", "Distinct bad samples, by reason.", "reason",
             BAD_SAMPLE_REASONS),
    _gauge("mcl_loader_queue_batches", "rank", "batches", "Batches ready in the prefetch queue."),
    _counter("mcl_loader_wait_seconds_total", "rank", "seconds", "Data wait: time that training waited for batches."),
    _counter("mcl_loader_stage_cpu_seconds_total", "rank", "seconds", "CPU time of the loader and its workers, by "
             "stage.", "stage", LOADER_STAGES),
    _counter("mcl_loader_worker_cpu_seconds_total", "rank", "seconds", "CPU time of all worker processes."),
    _gauge("mcl_loader_worker_peak_bytes", "rank", "bytes", "Sum of the peak memory of the worker processes."),
    _counter("mcl_storage_bytes_read_total", "rank", "bytes", "Bytes read from disk or received from the store."),
    _counter("mcl_storage_bytes_decoded_total", "rank", "bytes", "Bytes of the stills passed to the decoder."),
    _counter("mcl_storage_requests_total", "rank", "requests", "Requests to the store, including failed ones."),
    _counter("mcl_storage_retries_total", "rank", "requests", "Retried requests to the store, by reason.", "reason",
             RETRIES),
    _counter("mcl_storage_cache_hits_total", "rank", "shards", "Shards found in the shard cache."),
    _counter("mcl_storage_cache_misses_total", "rank", "shards", "Shards fetched into the shard cache."),
    _counter("mcl_storage_cache_evictions_total", "rank", "shards", "Shards evicted from the shard cache."),
    _counter("mcl_storage_cache_repairs_total", "rank", "shards", "Shards that were damaged in the shard cache and "
             "fetched again."),
    _counter("mcl_storage_seconds_total", "rank", "seconds", "Wall time of reading, summed over threads.", "stage",
             ("index", "fetch", "ranges", "read")),
)  # fmt: skip

RELIABILITY = (
    _gauge("mcl_heartbeat_age_seconds", "rank", "seconds", "Time since the rank's last step, start, or progress in an "
           "evaluation; it grows while the rank hangs."),
    _gauge("mcl_checkpoint_step", "run", "steps", "Step that a crash would return to: the newest complete checkpoint, "
           "or the step at the start of the process before its first checkpoint."),
    _gauge("mcl_checkpoint_age_seconds", "run", "seconds", "Age of the newest complete checkpoint; before the first, "
           "time since the start."),
    _gauge("mcl_checkpoint_seconds", "run", "seconds", "Duration of writing the newest checkpoint, mostly in the "
           "background."),
    _gauge("mcl_checkpoint_stall_seconds", "run", "seconds", "Training pause for the newest checkpoint."),
    _gauge("mcl_checkpoint_bytes", "run", "bytes", "Size of the newest checkpoint."),
    _counter("mcl_checkpoints_written_total", "run", "checkpoints", "Completed checkpoints."),
    _counter("mcl_checkpoints_failed_total", "run", "checkpoints", "Failed checkpoint writes."),
    _gauge("mcl_checkpoints_failed_in_a_row", "run", "checkpoints", "Consecutive failed checkpoint writes since the "
           "last completed one."),
    _counter("mcl_checkpoints_refused_total", "run", "checkpoints", "Checkpoints that failed verification at the start "
             "of the run and were not used."),
    _gauge("mcl_stopping", "run", "", "1 after a stop request: the run saves a checkpoint and exits."),
    _run_total("mcl_restarts_total", "restarts", "Restarts since the first start of the run, by the cause of the "
                  "previous exit.", "cause", RESTART_CAUSES),
    _gauge("mcl_goodput_ratio", "run", "ratio", "Goodput: productive share of the time since the first start."),
    _run_total("mcl_run_seconds_total", "seconds", "Time since the first start of the run, including restarts."),
    _run_total("mcl_productive_seconds_total", "seconds", "Time of productive steps: applied, and not repeated "
                  "after a restart."),
    _run_total("mcl_lost_seconds_total", "seconds", "Time that was not productive, by cause.", "cause", LOSSES),
)  # fmt: skip

MACHINE = (
    _gauge("mcl_gpu_utilization_ratio", "rank", "ratio", "Share of time in which the rank's GPU was busy."),
    _gauge("mcl_gpu_memory_used_bytes", "rank", "bytes", "GPU memory in use by all processes."),
    _gauge("mcl_gpu_memory_size_bytes", "rank", "bytes", "GPU memory size."),
    _gauge("mcl_gpu_memory_allocated_bytes", "rank", "bytes", "GPU memory allocated to tensors of the rank."),
    _gauge("mcl_gpu_temperature_celsius", "rank", "celsius", "GPU temperature."),
    _gauge("mcl_gpu_power_watts", "rank", "watts", "GPU power draw."),
    _gauge("mcl_host_memory_size_bytes", "node", "bytes", "Memory size of the machine."),
    _gauge("mcl_host_memory_available_bytes", "node", "bytes", "Memory available to new processes."),
    _gauge("mcl_disk_size_bytes", "node", "bytes", "Disk size, by volume.", "volume", VOLUMES),
    _gauge("mcl_disk_free_bytes", "node", "bytes", "Free disk space, by volume.", "volume", VOLUMES),
)  # fmt: skip

BUILD = (
    _gauge("mcl_build_videos_planned", "build", "videos", "Source videos of the build."),
    _gauge("mcl_build_videos_kept", "build", "videos", "Source videos finished by an earlier, interrupted build."),
    _counter("mcl_build_videos_total", "build", "videos", "Videos stored by this build."),
    _counter("mcl_build_refused_total", "build", "videos", "Videos refused by this build, by reason.", "reason",
             REFUSAL_REASONS),
    _counter("mcl_build_frames_total", "build", "frames", "Frames stored by this build."),
    _counter("mcl_build_bytes_total", "build", "bytes", "Bytes of the samples stored by this build."),
    _counter("mcl_build_retries_total", "build", "requests", "Retried requests to the store, by reason.", "reason",
             RETRIES),
    _counter("mcl_build_pushes_failed_total", "build", "requests", "Failed pushes to the Pushgateway."),
    _gauge("mcl_build_complete", "build", "", "1 once the shard set is complete, 0 before."),
)  # fmt: skip

# Exported by prometheus_client's ProcessCollector, where /proc exists.
PROCESS = (
    _counter("process_cpu_seconds_total", "rank", "seconds", "CPU time of the process."),
    _gauge("process_resident_memory_bytes", "rank", "bytes", "Resident memory of the process."),
    _gauge("process_virtual_memory_bytes", "rank", "bytes", "Virtual memory of the process."),
    _gauge("process_start_time_seconds", "rank", "seconds", "Start time of the process, in Unix time."),
    _gauge("process_open_fds", "rank", "", "Open file descriptors."),
    _gauge("process_max_fds", "rank", "", "Limit of open file descriptors."),
)

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Training": TRAINING,
    "Loader": LOADER,
    "Reliability": RELIABILITY,
    "Machine": MACHINE,
    "Builder": BUILD,
    "Process": PROCESS,
}
METRICS: dict[str, Metric] = {
    metric.name: metric for name, metrics in SECTIONS.items() if name != "Process" for metric in metrics
}


def max_series(*scopes: Scope) -> int:
    """Largest number of series of a process with these scopes, on a machine with a GPU, including PROCESS."""
    metrics = (metric for section in SECTIONS.values() for metric in section)
    return sum(metric.series for metric in metrics if metric.scope in scopes)

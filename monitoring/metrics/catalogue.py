"""All that is exported to Prometheus: names, types, units, labels, and what each is; `docs/metrics.md` is made from it.

Values of labels are counted here: whatever else turns up becomes `other`, so the number of series has a bound. Which
run, rank and node a series is of, Prometheus adds from `targets.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from mcl_dist.events import PHASES
from mcl_dist.run_log.goodput import CAUSES
from mcl_dist.storage.store_requests import Failure

Kind = Literal["counter", "gauge", "histogram"]
# Who exports it: the first rank for the whole run, every rank, the first rank of every node, the builder.
Scope = Literal["run", "rank", "node", "build"]

STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PHASE_SECONDS = (0.005, 0.01, 0.02, *STEP_SECONDS)
LOADER_STAGES = ("draw and read", "decode", "decode flow", "augment", "target")
BAD_SAMPLES = ("checksum", "header", "size", "missing", "maps", "decode")
RETRIES: tuple[str, ...] = get_args(Failure)
LOSSES = ("starting", "checkpoint", "evaluation", "skipped", *CAUSES)
REFUSALS = (
    "missing", "outside", "duplicate", "unreadable", "no video stream", "truncated", "turned", "too small", "too large",
    "too short",
)  # fmt: skip
MEASURES = ("top1", "top5", "mean_class")
VOLUMES = ("run", "cache", "checkpoint")
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """One name.

    Attributes:
        name: as it is scraped; a histogram's without `_bucket`.
        unit: base unit, or none.
        labels, values: its label, where it has one, and what that can be besides `other`; several labels have no list
            of values, and one set of them a process.
        buckets: a histogram's upper bounds.
        spans_restarts: whether a counter goes on over all starts of a run, so that a process has to learn it first.
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
        """How many series one process has of it at the most, without `other`."""
        each = len(self.buckets) + 3 if self.kind == "histogram" else 1  # the bucket above all, the sum, the count
        return each * max(1, len(self.values))


def _gauge(name: str, scope: Scope, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "gauge", scope, unit, text, (label,) if label else (), values)


def _counter(name: str, scope: Scope, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return Metric(name, "counter", scope, unit, text, (label,) if label else (), values)


def _total_of_run(name: str, unit: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Metric:
    return replace(_counter(name, "run", unit, text, label, values), spans_restarts=True)


TRAINING = (
    Metric("mcl_run_info", "gauge", "rank", "", "1, for what its labels say.",
           ("version", "torch", "precision", "device")),
    _counter("mcl_videos_total", "run", "videos", "Videos that training has consumed, over all ranks."),
    _gauge("mcl_step", "run", "steps", "Steps done."),
    _gauge("mcl_steps_planned", "run", "steps", "Steps of the whole run."),
    _gauge("mcl_epoch", "run", "epochs", "Epoch of the last step, counted from 0."),
    Metric("mcl_step_seconds", "histogram", "rank", "seconds", "Wall time of a step, waiting for data included.",
           buckets=STEP_SECONDS),
    Metric("mcl_step_phase_seconds", "histogram", "rank", "seconds",
           "Time of a step by phase, on a GPU by its own clock; `wait` and `keys` are a rank's own, the others hold "
           "waiting for ranks.",
           ("phase",), PHASES, PHASE_SECONDS),
    _gauge("mcl_data_wait_ratio", "run", "ratio", "Share of the last step spent waiting for data, mean over ranks."),
    _gauge("mcl_loss", "run", "nats", "Loss terms of the last step taken, unweighted, mean over ranks; `total` is "
           "their weighted sum.", "term", ("total", "inter", "intra", "alignment", "order")),
    _gauge("mcl_similarity", "run", "", "Mean cosine to positives, to negatives, and of the alignment.", "term",
           ("positive", "negative", "alignment")),
    _gauge("mcl_knn_accuracy_ratio", "run", "ratio", "What the encoder last scored on held-out videos by their nearest "
           "neighbours; absent without `evaluate.every`.", "measure", MEASURES),
    _gauge("mcl_evaluation_step", "run", "steps", "Steps done when it was scored."),
    _gauge("mcl_evaluation_seconds", "run", "seconds", "Time for which training stood still for it."),
    _gauge("mcl_gradient_norm", "run", "", "Norm of the gradient of the last step taken."),
    _gauge("mcl_learning_rate", "run", "", "Learning rate of the last step."),
    _gauge("mcl_momentum", "run", "ratio", "Momentum of the key encoder in the last step."),
    _gauge("mcl_queue_fill_ratio", "run", "ratio", "Share of the queue that holds keys of this run."),
    _gauge("mcl_queue_age_steps", "run", "steps", "Steps since the oldest key of the queue was written."),
    _counter("mcl_steps_skipped_total", "run", "steps", "Steps without a finite loss or gradient, which changed "
             "nothing."),
    _gauge("mcl_steps_skipped_in_a_row", "run", "steps", "Steps skipped since the last one taken."),
    _counter("mcl_loss_spikes_total", "run", "steps", "Losses far above those before them.", "answer",
             ("warned", "rolled_back")),
    _counter("mcl_flops_total", "run", "operations", "Floating-point operations of all steps, over all ranks: "
             "convolutions and matrix products."),
    _gauge("mcl_flops_per_second", "run", "operations/second", "Floating-point operations a second in the last step, "
           "over all ranks."),
    _gauge("mcl_flops_peak_ratio", "run", "ratio", "The same as a share of what the devices can do at most; absent "
           "where that is unknown."),
)  # fmt: skip

LOADER = (
    _counter("mcl_loader_samples_expected_total", "rank", "samples", "Samples that the steps so far asked for."),
    _counter("mcl_loader_samples_delivered_total", "rank", "samples", "Of these, those that came."),
    _counter("mcl_loader_samples_replaced_total", "rank", "samples", "Of these, those that were bad and had others "
             "stand in for them."),
    _gauge("mcl_loader_samples_unaccounted", "rank", "samples", "Samples expected, minus delivered, minus replaced; "
           "never anything but 0."),
    _counter("mcl_loader_bad_samples_total", "rank", "samples", "Different bad samples.", "reason", BAD_SAMPLES),
    _gauge("mcl_loader_queue_batches", "rank", "batches", "Batches that are ready."),
    _counter("mcl_loader_wait_seconds_total", "rank", "seconds", "Time that training waited for data."),
    _counter("mcl_loader_stage_cpu_seconds_total", "rank", "seconds", "CPU time of the loader, its workers' included.",
             "stage", LOADER_STAGES),
    _counter("mcl_loader_worker_cpu_seconds_total", "rank", "seconds", "CPU time of all worker processes."),
    _gauge("mcl_loader_worker_peak_bytes", "rank", "bytes", "The most memory that the worker processes held, each at "
           "its own time."),
    _counter("mcl_storage_bytes_read_total", "rank", "bytes", "Bytes read or received."),
    _counter("mcl_storage_bytes_decoded_total", "rank", "bytes", "Bytes of the stills handed on to be decoded."),
    _counter("mcl_storage_requests_total", "rank", "requests", "Requests to the store, failed ones included."),
    _counter("mcl_storage_retries_total", "rank", "requests", "Requests that had to be made again.", "reason", RETRIES),
    _counter("mcl_storage_cache_hits_total", "rank", "shards", "Shards found in the cache."),
    _counter("mcl_storage_cache_misses_total", "rank", "shards", "Shards fetched into the cache."),
    _counter("mcl_storage_cache_evictions_total", "rank", "shards", "Shards evicted from the cache."),
    _counter("mcl_storage_cache_repairs_total", "rank", "shards", "Shards that had gone bad in the cache and were "
             "fetched again."),
    _counter("mcl_storage_seconds_total", "rank", "seconds", "Wall time of reading, summed over threads.", "stage",
             ("index", "fetch", "ranges", "read")),
)  # fmt: skip

RELIABILITY = (
    _gauge("mcl_heartbeat_age_seconds", "rank", "seconds", "Time since this rank's last step, or its start, or its "
           "last sign of life in an evaluation; it grows while the rank hangs."),
    _gauge("mcl_checkpoint_step", "run", "steps", "Step that a crash would go back to: of the newest complete "
           "checkpoint, 0 before the first."),
    _gauge("mcl_checkpoint_age_seconds", "run", "seconds", "Time since it was completed, or since the start where none "
           "has been."),
    _gauge("mcl_checkpoint_seconds", "run", "seconds", "Time that it took, mostly beside training."),
    _gauge("mcl_checkpoint_stall_seconds", "run", "seconds", "Time for which training stood still for it."),
    _gauge("mcl_checkpoint_bytes", "run", "bytes", "Its size."),
    _counter("mcl_checkpoints_written_total", "run", "checkpoints", "Checkpoints completed."),
    _counter("mcl_checkpoints_failed_total", "run", "checkpoints", "Checkpoints that could not be written."),
    _gauge("mcl_checkpoints_failed_in_a_row", "run", "checkpoints", "Of these, those since the last complete one."),
    _counter("mcl_checkpoints_refused_total", "run", "checkpoints", "Checkpoints that did not pass verification when "
             "the run started, and were left aside."),
    _gauge("mcl_stopping", "run", "", "1 once a rank was asked to stop; the run saves and leaves."),
    _total_of_run("mcl_restarts_total", "restarts", "Restarts since the run first began, by what ended it before.",
                  "cause", CAUSES),
    _gauge("mcl_goodput_ratio", "run", "ratio", "Productive share of the time since the run first began."),
    _total_of_run("mcl_run_seconds_total", "seconds", "Time since the run first began, over all restarts."),
    _total_of_run("mcl_productive_seconds_total", "seconds", "Of it, time of steps that count: taken, and not "
                  "repeated since."),
    _total_of_run("mcl_lost_seconds_total", "seconds", "The rest, by what it went into.", "cause", LOSSES),
)  # fmt: skip

MACHINE = (
    _gauge("mcl_gpu_utilization_ratio", "rank", "ratio", "Share of time in which the rank's GPU was busy."),
    _gauge("mcl_gpu_memory_used_bytes", "rank", "bytes", "Memory of the GPU in use, by anyone."),
    _gauge("mcl_gpu_memory_size_bytes", "rank", "bytes", "Memory of the GPU."),
    _gauge("mcl_gpu_memory_allocated_bytes", "rank", "bytes", "Memory that tensors of this rank hold."),
    _gauge("mcl_gpu_temperature_celsius", "rank", "celsius", "Temperature of the GPU."),
    _gauge("mcl_gpu_power_watts", "rank", "watts", "Power that the GPU draws."),
    _gauge("mcl_host_memory_size_bytes", "node", "bytes", "Memory of the machine."),
    _gauge("mcl_host_memory_available_bytes", "node", "bytes", "Memory that new processes could have."),
    _gauge("mcl_disk_size_bytes", "node", "bytes", "Size of a disk.", "volume", VOLUMES),
    _gauge("mcl_disk_free_bytes", "node", "bytes", "What is free of it.", "volume", VOLUMES),
)  # fmt: skip

BUILD = (
    _gauge("mcl_build_videos_planned", "build", "videos", "Videos to be stored or refused."),
    _gauge("mcl_build_videos_kept", "build", "videos", "Of these, those that an earlier run had finished."),
    _counter("mcl_build_videos_total", "build", "videos", "Videos stored by this run."),
    _counter("mcl_build_refused_total", "build", "videos", "Videos refused by this run.", "reason", REFUSALS),
    _counter("mcl_build_frames_total", "build", "frames", "Frames stored."),
    _counter("mcl_build_bytes_total", "build", "bytes", "Bytes of the samples stored."),
    _counter("mcl_build_retries_total", "build", "requests", "Requests that had to be made again.", "reason", RETRIES),
    _counter("mcl_build_pushes_failed_total", "build", "requests", "Pushes of these metrics to a gateway that failed."),
    _gauge("mcl_build_complete", "build", "", "1 once the set is complete, 0 before."),
)  # fmt: skip

# What prometheus_client says of the process that it is in, where there is a /proc.
PROCESS = (
    _counter("process_cpu_seconds_total", "rank", "seconds", "CPU time of the process."),
    _gauge("process_resident_memory_bytes", "rank", "bytes", "Memory that it holds."),
    _gauge("process_virtual_memory_bytes", "rank", "bytes", "Addresses that it has taken."),
    _gauge("process_start_time_seconds", "rank", "seconds", "When it started, in Unix time."),
    _gauge("process_open_fds", "rank", "", "File descriptors that it holds."),
    _gauge("process_max_fds", "rank", "", "File descriptors that it may hold."),
)

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Training": TRAINING,
    "Loader": LOADER,
    "Reliability": RELIABILITY,
    "Machine": MACHINE,
    "Builder": BUILD,
    "Process": PROCESS,
}
OWN: dict[str, Metric] = {
    metric.name: metric for name, metrics in SECTIONS.items() if name != "Process" for metric in metrics
}


def series_of(*scopes: Scope) -> int:
    """Series of a process that exports so much, the process's own included: at the most, on a machine with a GPU."""
    metrics = (metric for section in SECTIONS.values() for metric in section)
    return sum(metric.series for metric in metrics if metric.scope in scopes)

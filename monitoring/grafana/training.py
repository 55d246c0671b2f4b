"""Dashboard "training": how far, how fast, and whether it learns."""

from __future__ import annotations

from monitoring.grafana.panels import HOST_MEMORY_FREE, Panel, dashboard

PROGRESS = [
    Panel(
        "Done",
        "Share of the run's steps that are done.",
        "percentunit",
        {"{{run}}": "mcl_step{@run} / mcl_steps_planned{@run}"},
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Left",
        "Time that the remaining steps take at the pace of the last hour.",
        "dtdurations",
        {"{{run}}": "(mcl_steps_planned{@run} - mcl_step{@run}) * on (job, run) run:mcl_step_seconds:mean1h{@run}"},
        kind="stat",
        width=4,
    ),
    Panel(
        "Epoch",
        "Epoch that the run is in, counted from 0.",
        "none",
        {"{{run}}": "mcl_epoch{@run}"},
        kind="stat",
        width=4,
    ),
    Panel(
        "Loss",
        "Weighted sum of all terms in the last step that was taken.",
        "none",
        {"{{run}}": 'mcl_loss{@run,term="total"}'},
        kind="stat",
        width=4,
    ),
    Panel(
        "Waiting for data",
        "Share of the steps' time spent waiting for batches. From a fifth on the loader is what limits the run.",
        "percentunit",
        {"{{run}}": "run:mcl_data_wait:ratio5m{@run}"},
        limit=0.2,
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Steps skipped",
        "Steps whose loss or gradient was no number; they changed nothing.",
        "none",
        {"{{run}}": "sum by (run) (increase(mcl_steps_skipped_total{@run}[$__rate_interval]))"},
        limit=1,
        kind="stat",
        width=4,
    ),
]

SPEED = [
    Panel(
        "Throughput",
        "Videos trained on in a second, over all ranks.",
        "cps",
        {"{{run}}": "sum by (run) (rate(mcl_videos_total{@run}[$__rate_interval]))"},
    ),
    Panel(
        "Step time",
        "Median and 99th percentile of a step's wall time over the chosen ranks. Far apart: some steps hang.",
        "s",
        {
            f"{{{{run}}}} p{percent}": f"histogram_quantile({percent / 100}, sum by (run, le) "
            "(rate(mcl_step_seconds_bucket{@rank}[$__rate_interval])))"
            for percent in (50, 99)
        },
    ),
    Panel(
        "Where a step's time goes",
        "Mean seconds a step by phase, over the chosen ranks.",
        "s",
        {
            "{{phase}}": "sum by (phase) (rate(mcl_step_phase_seconds_sum{@rank}[$__rate_interval])) "
            "/ on () group_left sum(rate(mcl_step_seconds_count{@rank}[$__rate_interval]))"
        },
        kind="stack",
    ),
    Panel(
        "Ranks' own time",
        "Mean seconds a step that a rank needs whatever the others do: waiting for its data and encoding keys. One "
        "that lies above the others holds all of them up.",
        "s",
        {"{{run}} {{rank}}": "rank:mcl_own_seconds:mean5m{@rank}"},
    ),
    Panel(
        "Slowest rank",
        "Own time of the slowest rank over that of the rank in the middle. At 1 all are alike.",
        "none",
        {"{{run}}": "run:mcl_straggler:ratio5m{@run}"},
        limit=1.25,
    ),
    Panel(
        "Arithmetic",
        "Floating-point operations (convolutions and matrix products) in a second, over all ranks.",
        "flops",
        {"{{run}}": "sum by (run) (rate(mcl_flops_total{@run}[$__rate_interval]))"},
    ),
    Panel(
        "Share of the devices' peak",
        "Arithmetic done over what the devices could do. Empty where the peak is unknown, as on CPUs.",
        "percentunit",
        {"{{run}}": "mcl_flops_peak_ratio{@run}"},
        top=1,
    ),
]

LEARNING = [
    Panel(
        "Loss terms",
        "Unweighted terms of the last step that was taken, means over ranks.",
        "none",
        {"{{run}} {{term}}": "mcl_loss{@run}"},
    ),
    Panel(
        "Similarities",
        "Cosines of a query with its positive keys and with the queue's. Positives should rise above negatives.",
        "none",
        {"{{run}} {{term}}": "mcl_similarity{@run}"},
    ),
    Panel(
        "Nearest neighbours",
        "Accuracy on held-out videos by their nearest neighbours. Empty without `evaluate.every`.",
        "percentunit",
        {"{{run}} {{measure}}": "mcl_knn_accuracy_ratio{@run}"},
        top=1,
    ),
    Panel(
        "Gradient norm",
        "Of the last step that was taken, over all parameters.",
        "none",
        {"{{run}}": "mcl_gradient_norm{@run}"},
    ),
    Panel("Learning rate", "Of the last step.", "none", {"{{run}}": "mcl_learning_rate{@run}"}),
    Panel(
        "Key encoder's momentum",
        "Share of itself that the key encoder keeps in a step.",
        "percentunit",
        {"{{run}}": "mcl_momentum{@run}"},
        top=1,
    ),
    Panel(
        "Queue",
        "Share of the queue that holds keys of this run.",
        "percentunit",
        {"{{run}}": "mcl_queue_fill_ratio{@run}"},
        top=1,
    ),
    Panel(
        "Age of the oldest key",
        "Steps since the oldest key in the queue was encoded. Keys that are too old were made by another network.",
        "none",
        {"{{run}}": "mcl_queue_age_steps{@run}"},
    ),
    Panel(
        "Not finite",
        "Steps skipped because their loss or gradient was no number. More than a few mean a rate that is too high or "
        "broken data.",
        "none",
        {"{{run}}": "sum by (run) (increase(mcl_steps_skipped_total{@run}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Leaps of the loss",
        "Losses far above those before them, by what was done about them.",
        "none",
        {"{{run}} {{answer}}": "sum by (run, answer) (increase(mcl_loss_spikes_total{@run}[$__rate_interval]))"},
        limit=1,
    ),
]

MACHINES = [
    Panel(
        "GPU use",
        "Share of the time in which a kernel ran. Empty without GPUs.",
        "percentunit",
        {"{{run}} {{rank}}": "mcl_gpu_utilization_ratio{@rank}"},
        limit=0.5,
        good="above",
        top=1,
    ),
    Panel(
        "GPU memory",
        "Share of the device's memory in use, by anyone. Empty without GPUs.",
        "percentunit",
        {"{{run}} {{rank}}": "mcl_gpu_memory_used_bytes{@rank} / mcl_gpu_memory_size_bytes{@rank}"},
        limit=0.95,
        top=1,
    ),
    Panel(
        "GPU temperature",
        "Devices slow down from about 85 degrees on. Empty without GPUs.",
        "celsius",
        {"{{run}} {{rank}}": "mcl_gpu_temperature_celsius{@rank}"},
        limit=85,
    ),
    Panel(
        "CPU time of ranks",
        "CPU seconds in a second, a rank's worker processes not included.",
        "none",
        {"{{run}} {{rank}}": "sum by (run, rank) (rate(process_cpu_seconds_total{@rank}[$__rate_interval]))"},
    ),
    Panel(
        "Memory of ranks",
        "Memory that a rank's process holds.",
        "bytes",
        {"{{run}} {{rank}}": "process_resident_memory_bytes{@rank}"},
    ),
    HOST_MEMORY_FREE,
]

TRAINING = dashboard(
    "training",
    "How far pre-training is, how fast it goes, where its time goes, and whether it learns.",
    "mcl_step_seconds_count",
    {"Progress": PROGRESS, "Speed": SPEED, "TrainingState": LEARNING, "Machines": MACHINES},
    ("job", "run", "rank"),
)

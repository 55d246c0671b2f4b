"""Dashboard "training": progress, speed, learning curves and machines."""

from monitoring.grafana.panels import HOST_MEMORY_FREE, Panel, dashboard

PROGRESS = [
    Panel(
        "Steps done",
        "Completed share of the planned steps.",
        "percentunit",
        {"{{run}}": "mcl_step{@run} / mcl_steps_planned{@run}"},
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Time left",
        "Remaining steps times the mean step time of the last hour.",
        "dtdurations",
        {"{{run}}": "(mcl_steps_planned{@run} - mcl_step{@run}) * on (job, run) run:mcl_step_seconds:mean1h{@run}"},
        kind="stat",
        width=4,
    ),
    Panel("Epoch", "Current epoch, counted from 0.", "none", {"{{run}}": "mcl_epoch{@run}"}, kind="stat", width=4),
    Panel(
        "Loss",
        "Total loss (weighted sum of all terms) of the last applied step.",
        "none",
        {"{{run}}": 'mcl_loss{@run,term="total"}'},
        kind="stat",
        width=4,
    ),
    Panel(
        "Data wait",
        "Share of step time spent waiting for batches. Above 20 %, the loader limits the run.",
        "percentunit",
        {"{{run}}": "run:mcl_data_wait:ratio5m{@run}"},
        limit=0.2,
        kind="stat",
        width=4,
        top=1,
    ),
    Panel(
        "Steps skipped",
        "Steps whose loss or gradient was not finite; they updated no parameters.",
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
        "Training videos per second, over all ranks.",
        "cps",
        {"{{run}}": "sum by (run) (rate(mcl_videos_total{@run}[$__rate_interval]))"},
    ),
    Panel(
        "Step time",
        "Median and 99th percentile of the step time of the selected ranks. A large gap means delays in some steps.",
        "s",
        {
            f"{{{{run}}}} p{percent}": f"histogram_quantile({percent / 100}, sum by (run, le) "
            "(rate(mcl_step_seconds_bucket{@rank}[$__rate_interval])))"
            for percent in (50, 99)
        },
    ),
    Panel(
        "Step time by phase",
        "Mean time per step in each phase, over the selected ranks.",
        "s",
        {
            "{{phase}}": "sum by (phase) (rate(mcl_step_phase_seconds_sum{@rank}[$__rate_interval])) "
            "/ on () group_left sum(rate(mcl_step_seconds_count{@rank}[$__rate_interval]))"
        },
        kind="stack",
    ),
    Panel(
        "Own time by rank",
        "Mean time per step that a rank needs independently of the others: data wait and key encoding. A rank above "
        "the others is a straggler.",
        "s",
        {"{{run}} {{rank}}": "rank:mcl_own_seconds:mean5m{@rank}"},
    ),
    Panel(
        "Straggler ratio",
        "Own time of the slowest rank divided by the median over ranks. 1 means equal ranks.",
        "none",
        {"{{run}}": "run:mcl_straggler:ratio5m{@run}"},
        limit=1.25,
    ),
    Panel(
        "FLOP/s",
        "Floating-point operations (convolutions and matrix products) per second, over all ranks.",
        "flops",
        {"{{run}}": "sum by (run) (rate(mcl_flops_total{@run}[$__rate_interval]))"},
    ),
    Panel(
        "Model FLOPs utilisation",
        "FLOP/s divided by the devices' peak. Empty where the peak is unknown, as on CPUs.",
        "percentunit",
        {"{{run}}": "mcl_flops_peak_ratio{@run}"},
        top=1,
    ),
]

LEARNING = [
    Panel(
        "Loss terms",
        "Unweighted loss terms of the last applied step, mean over ranks.",
        "none",
        {"{{run}} {{term}}": "mcl_loss{@run}"},
    ),
    Panel(
        "Similarities",
        "Cosine similarity of queries to their positive keys and to the negative queue. Positives should rise above "
        "negatives.",
        "none",
        {"{{run}} {{term}}": "mcl_similarity{@run}"},
    ),
    Panel(
        "Online kNN",
        "kNN accuracy on held-out videos. Empty without `evaluate.every`.",
        "percentunit",
        {"{{run}} {{measure}}": "mcl_knn_accuracy_ratio{@run}"},
        top=1,
    ),
    Panel(
        "Gradient norm",
        "Gradient norm of the last applied step, over all parameters.",
        "none",
        {"{{run}}": "mcl_gradient_norm{@run}"},
    ),
    Panel("Learning rate", "Learning rate of the last step.", "none", {"{{run}}": "mcl_learning_rate{@run}"}),
    Panel(
        "Key encoder momentum",
        "Share of its own weights that the key encoder keeps in a step.",
        "percentunit",
        {"{{run}}": "mcl_momentum{@run}"},
        top=1,
    ),
    Panel(
        "Queue fill",
        "Share of the negative queue that holds keys of this run.",
        "percentunit",
        {"{{run}}": "mcl_queue_fill_ratio{@run}"},
        top=1,
    ),
    Panel(
        "Age of the oldest key",
        "Steps since the oldest key in the negative queue was encoded. The encoder has changed since then.",
        "none",
        {"{{run}}": "mcl_queue_age_steps{@run}"},
    ),
    Panel(
        "Non-finite steps",
        "Steps skipped because their loss or gradient was not finite. More than a few mean that the learning rate is "
        "too high or the data are damaged.",
        "none",
        {"{{run}}": "sum by (run) (increase(mcl_steps_skipped_total{@run}[$__rate_interval]))"},
        limit=1,
    ),
    Panel(
        "Loss spikes",
        "Loss spikes, by the response to them.",
        "none",
        {"{{run}} {{answer}}": "sum by (run, answer) (increase(mcl_loss_spikes_total{@run}[$__rate_interval]))"},
        limit=1,
    ),
]

MACHINES = [
    Panel(
        "GPU utilisation",
        "Share of time in which a kernel ran. Empty without GPUs.",
        "percentunit",
        {"{{run}} {{rank}}": "mcl_gpu_utilization_ratio{@rank}"},
        limit=0.5,
        good="above",
        top=1,
    ),
    Panel(
        "GPU memory",
        "Share of GPU memory in use by all processes. Empty without GPUs.",
        "percentunit",
        {"{{run}} {{rank}}": "mcl_gpu_memory_used_bytes{@rank} / mcl_gpu_memory_size_bytes{@rank}"},
        limit=0.95,
        top=1,
    ),
    Panel(
        "GPU temperature",
        "GPUs throttle above about 85 °C. Empty without GPUs.",
        "celsius",
        {"{{run}} {{rank}}": "mcl_gpu_temperature_celsius{@rank}"},
        limit=85,
    ),
    Panel(
        "CPU time of ranks",
        "CPU seconds per second of a rank, without its worker processes.",
        "none",
        {"{{run}} {{rank}}": "sum by (run, rank) (rate(process_cpu_seconds_total{@rank}[$__rate_interval]))"},
    ),
    Panel(
        "Memory of ranks",
        "Resident memory of a rank.",
        "bytes",
        {"{{run}} {{rank}}": "process_resident_memory_bytes{@rank}"},
    ),
    HOST_MEMORY_FREE,
]

TRAINING = dashboard(
    "training",
    "Progress, speed, learning curves and machines of pre-training runs.",
    "mcl_step_seconds_count",
    {"Progress": PROGRESS, "Speed": SPEED, "Learning": LEARNING, "Machines": MACHINES},
    ("job", "run", "rank"),
)

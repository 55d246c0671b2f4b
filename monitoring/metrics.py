"""What the training run exports to Prometheus, in base units and with bounded labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mcl_dist.events import CheckpointWritten, Event, LoaderReport, LossSpike, StepDone, StepSkipped
from monitoring.loader_metrics import LoaderMetrics

STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class TrainingMetrics:
    """A listener that turns events into metrics of a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._loader = LoaderMetrics(own)
        self._videos = Counter("mcl_videos_total", "Videos that training has consumed, over all ranks.", registry=own)
        self._step = Gauge("mcl_step", "Steps done.", registry=own)
        self._steps = Gauge("mcl_steps_planned", "Steps of the whole run.", registry=own)
        self._seconds = Histogram(
            "mcl_step_seconds", "Wall time of a step, waiting for data included.", buckets=STEP_SECONDS, registry=own
        )
        self._wait = Gauge("mcl_data_wait_ratio", "Share of the last step spent waiting for data.", registry=own)
        self._rate = Gauge("mcl_learning_rate", "Learning rate of the last step.", registry=own)
        self._report = Gauge("mcl_objective", "Loss terms and similarities, mean over ranks.", ["term"], registry=own)
        self._gradient = Gauge("mcl_gradient_norm", "Norm of the last step's gradient.", registry=own)
        self._skipped = Counter(
            "mcl_steps_skipped_total", "Steps without a finite loss or gradient, which changed nothing.", registry=own
        )
        self._in_a_row = Gauge("mcl_steps_skipped_in_a_row", "Steps skipped since the last one taken.", registry=own)
        self._spikes = Counter("mcl_loss_spikes_total", "Losses far above those before them.", ["answer"], registry=own)
        for answer in ("warned", "rolled_back"):
            self._spikes.labels(answer)  # so that a scrape finds 0 before the first
        self._checkpoint = Gauge("mcl_checkpoint_step", "Step of the newest complete checkpoint.", registry=own)
        self._saving = Gauge("mcl_checkpoint_seconds", "Seconds that the newest checkpoint took.", registry=own)

    def __call__(self, event: Event) -> None:
        """Count what happened."""
        match event:
            case StepDone():
                self._videos.inc(event.videos)
                self._step.set(event.step)
                self._steps.set(event.total_steps)
                self._seconds.observe(event.seconds)
                self._wait.set(event.data_wait_ratio)
                self._rate.set(event.learning_rate)
                if not event.taken:
                    return
                self._in_a_row.set(0)
                self._gradient.set(event.gradient_norm)
                for term, value in event.losses.items():
                    self._report.labels(term).set(value)
            case StepSkipped():
                self._skipped.inc()
                self._in_a_row.set(event.in_a_row)
            case LossSpike():
                self._spikes.labels("warned" if event.rolled_back_to is None else "rolled_back").inc()
            case LoaderReport():
                self._loader.take(event)
            case CheckpointWritten(step=step, seconds=seconds):
                self._checkpoint.set(step)
                self._saving.set(seconds)

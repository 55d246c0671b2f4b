"""Events of a run. Code that emits an event does not depend on the listeners that receive it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

LoaderStage = Literal["draw and read", "decode", "decode flow", "augment", "target"]
BadSampleReason = Literal["checksum", "header", "size", "missing", "maps", "decode"]
RefusalReason = Literal[
    "missing", "outside", "duplicate", "unreadable", "no video stream", "truncated", "turned", "too small", "too large",
    "too short",
]  # fmt: skip

# Label values of the data path's metrics: the loader and the builder report them, `monitoring` exports them.
LOADER_STAGES: tuple[LoaderStage, ...] = get_args(LoaderStage)
BAD_SAMPLE_REASONS: tuple[BadSampleReason, ...] = get_args(BadSampleReason)
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)

# Phases of a step. `wait` (for data) and, unless BatchNorm is synchronised, `keys` depend on this rank alone; the other
# phases include waits for other ranks: `exchange` is the collective of the keys.
PHASES = ("wait", "keys", "exchange", "forward", "backward", "checkpoint", "update", "other")


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Started(Event):
    """The run starts after `step` steps, from the checkpoint `resumed_from` or from scratch."""

    step: int
    total_steps: int
    resumed_from: str | None


@dataclass(frozen=True)
class StepDone(Event):
    """One step, over all ranks.

    Attributes:
        step: steps done, this one included.
        epoch: of this step, counted from 0.
        total_steps: length of the run.
        losses: the objective's losses by name, mean over ranks.
        learning_rate: used in this step.
        videos: number in the global batch.
        seconds: wall time, waits included.
        data_wait_ratio: share of `seconds` spent waiting for data, mean over ranks.
        gradient_norm: over all parameters.
        taken: whether it updated the parameters; a step without finite loss and gradient is skipped.
        phases: seconds of this rank by phase of `PHASES`, in GPU time on a GPU. In `checkpoint` the step waits for a
            checkpoint's copy.
        momentum: of the key encoder in this step.
        queue_fill: fraction of the queue that holds keys of this run.
        queue_age: steps since the oldest of these keys was written.
        flops: floating-point operations of the step, over all ranks; 0 where they were not counted.
    """

    step: int
    epoch: int
    total_steps: int
    losses: dict[str, float]
    learning_rate: float
    videos: int
    seconds: float
    data_wait_ratio: float
    gradient_norm: float = 0.0
    taken: bool = True
    phases: dict[str, float] = field(default_factory=dict)
    momentum: float = 0.0
    queue_fill: float = 0.0
    queue_age: float = 0.0
    flops: float = 0.0

    @property
    def videos_per_second(self) -> float:
        """Throughput of this step."""
        return self.videos / self.seconds


@dataclass(frozen=True)
class StepSkipped(Event):
    """A step had no finite loss or gradient and changed nothing.

    Attributes:
        step: steps done, this one included.
        samples: names of the samples that may have caused it.
        reason: why these samples.
        in_a_row: consecutive skipped steps, this one included.
    """

    step: int
    samples: list[str]
    reason: str
    in_a_row: int


@dataclass(frozen=True)
class LossSpike(Event):
    """A step's loss exceeds `limit`, set by earlier losses; `rolled_back_to` is the restored checkpoint's step."""

    step: int
    loss: float
    limit: float
    rolled_back_to: int | None


@dataclass(frozen=True)
class LoaderReport(Event):
    """What a rank's loader has done since its start; all numbers are totals.

    Attributes:
        expected: samples that the steps so far needed.
        delivered, replaced: of these, the samples delivered, and the bad ones that others replaced.
        bad_samples: distinct bad samples, by reason.
        waited_seconds: that the training loop waited for batches.
        queue: batches that are ready now.
        stages: CPU seconds by stage.
        storage: counters of reading: bytes, requests, retries by reason, cache hits and evictions, seconds.
        worker_cpu_seconds, worker_peak_bytes: of all worker processes together.
    """

    expected: int
    delivered: int
    replaced: int
    bad_samples: dict[str, int]
    waited_seconds: float
    queue: int
    stages: dict[str, float]
    storage: dict[str, Any]
    worker_cpu_seconds: float
    worker_peak_bytes: int


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint is complete.

    Attributes:
        step: steps done in its state.
        url: its folder.
        seconds: from its start until it was complete.
        stall_seconds: of these, those in which training waited: at its start, and before the next update until the
            state that the update changes was copied. The wait at the end of a run does not count.
        bytes: size of all its files.
    """

    step: int
    url: str
    seconds: float
    stall_seconds: float
    bytes: int


@dataclass(frozen=True)
class CheckpointFailed(Event):
    """Writing a checkpoint failed, `in_a_row` times in a row; the run continues and tries again later."""

    step: int
    url: str
    reason: str
    in_a_row: int


@dataclass(frozen=True)
class CheckpointRefused(Event):
    """A run that looked for a checkpoint to resume from skipped an incomplete, damaged or poisoned one."""

    url: str
    reason: str


@dataclass(frozen=True)
class Evaluating(Event):
    """An evaluation on held-out videos after `step` steps has done `done` of this rank's `videos` of a set.

    Emitted at the start of each set and then periodically, as a heartbeat; training waits meanwhile.
    """

    step: int
    done: int
    videos: int


@dataclass(frozen=True)
class Evaluated(Event):
    """Scores of the query encoder on held-out videos.

    Attributes:
        step: steps done.
        scores: k-NN accuracies, fractions by name: `top1`, `top5`, `mean_class`.
        seconds: for which training waited.
    """

    step: int
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Notice(Event):
    """A message to the user."""

    text: str


@dataclass(frozen=True)
class Stopping(Event):
    """The run stops before its last step because a rank was asked to; the state after `step` steps is saved."""

    step: int
    reason: str


@dataclass(frozen=True)
class Restarted(Event):
    """A run that had started before resumes.

    Attributes:
        cause: what ended it, one of `goodput.RESTART_CAUSES`.
        attempt: consecutive restarts by the supervisor without progress, this one included; 0 for a manual start.
        lost_seconds: since the state that it resumes from: steps to repeat, downtime, start-up.
        reason: the cause in a sentence.
        step: steps done in the state that it resumes from.
    """

    cause: str
    attempt: int
    lost_seconds: float
    reason: str
    step: int


@dataclass(frozen=True)
class Accounts(Event):
    """How the time since the run's first start was spent, over all restarts.

    Attributes:
        goodput: productive fraction of the wall time.
        wall_seconds: since the first start.
        productive_seconds: of steps that were taken and not repeated since.
        lost_seconds: the rest, by use: `starting`, `checkpoint`, `evaluation`, `skipped`, a restart's cause, `other`.
        restarts: number by cause.
    """

    goodput: float
    wall_seconds: float
    productive_seconds: float
    lost_seconds: dict[str, float]
    restarts: dict[str, int]


@dataclass(frozen=True)
class Finished(Event):
    """All steps are done; `peak_bytes` is this rank's peak memory."""

    step: int
    peak_bytes: int


@dataclass(frozen=True)
class Failed(Event):
    """The run ends early with an error."""

    reason: str


Listener = Callable[[Event], None]


def emit(listeners: Iterable[Listener], event: Event) -> None:
    """Pass an event to every listener, in order."""
    for listener in listeners:
        listener(event)

"""What a run tells the outside: events go to listeners, and who tells them knows nothing of who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

# Of a step. Waiting for its data and, unless BatchNorm is synchronised, encoding keys take as long as a rank needs by
# itself; the other phases hold waiting for other ranks: `exchange` that of the keys.
PHASES = ("wait", "keys", "exchange", "forward", "backward", "checkpoint", "update", "other")


@dataclass(frozen=True)
class Started:
    """The run starts after `step` steps, from the checkpoint `resumed_from` or from nothing."""

    step: int
    total_steps: int
    resumed_from: str | None


@dataclass(frozen=True)
class StepDone:
    """One step, over all ranks.

    Attributes:
        step: steps done, this one included.
        epoch: of this step, counted from 0.
        total_steps: length of the run.
        losses: mean over ranks of the objective's report.
        learning_rate: used in this step.
        videos: in the global batch.
        seconds: of wall time, waiting included.
        data_wait_ratio: share of `seconds` spent waiting for data, mean over ranks.
        gradient_norm: of all parameters together.
        taken: whether it changed anything; a step without a finite loss and gradient does not.
        phases: seconds that this rank spent by phase, those of `PHASES`; on a GPU by its own clock. In `checkpoint` the
            step stood still for the copy of a checkpoint.
        momentum: of the key encoder in this step.
        queue_fill: share of the queue that holds keys of this run.
        queue_age: steps since the oldest of them was written.
        operations: floating-point operations that the step needs, over all ranks; 0 where nobody has counted.
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
    operations: float = 0.0

    @property
    def videos_per_second(self) -> float:
        """Throughput of this step."""
        return self.videos / self.seconds


@dataclass(frozen=True)
class StepSkipped:
    """A step had no finite loss or gradient and changed nothing.

    Attributes:
        step: steps done, this one included.
        samples: that may have caused it, by the name that the data side has for them.
        reason: why these.
        in_a_row: steps skipped one after another, this one included.
    """

    step: int
    samples: list[str]
    reason: str
    in_a_row: int


@dataclass(frozen=True)
class LossSpike:
    """The loss of a step lies above `limit`, far from those before it; `rolled_back_to` is the step that came back."""

    step: int
    loss: float
    limit: float
    rolled_back_to: int | None


@dataclass(frozen=True)
class LoaderReport:
    """What has fed a rank since it began; each counts from there.

    Attributes:
        expected: samples that the steps so far ask for.
        delivered, replaced: of these, those that came, and those that were bad and had others stand in for them.
        bad_samples: different bad samples, by reason.
        waited_seconds: that the training loop waited for batches.
        queue: batches that are ready.
        stages: CPU seconds by stage.
        storage: counts of reading: bytes, requests, retries by reason, hits and evictions of the cache, seconds.
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
class CheckpointWritten:
    """A checkpoint is complete.

    Attributes:
        step: steps done when it was taken.
        url: its folder.
        seconds: from its beginning until it was complete.
        stall_seconds: of these, those in which training stood still: while it was begun, and before the next update
            until all that this changes was copied. What a run waits for at its end, with nothing left to do, is not
            in it.
        bytes: of all its files.
    """

    step: int
    url: str
    seconds: float
    stall_seconds: float
    bytes: int


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint could not be written, the last `in_a_row` of so many; the run goes on, and tries again later."""

    step: int
    url: str
    reason: str
    in_a_row: int


@dataclass(frozen=True)
class CheckpointRefused:
    """A checkpoint that is torn, damaged or poisoned was passed over when the run looked for one to start from."""

    url: str
    reason: str


@dataclass(frozen=True)
class Evaluating:
    """Training stands still after `step` steps while held-out videos score it: `done` of a rank's `videos` of a set.

    Told at the beginning of each set and then now and again, as a sign of life.
    """

    step: int
    done: int
    videos: int


@dataclass(frozen=True)
class Evaluated:
    """What held-out videos say of the query encoder.

    Attributes:
        step: steps done.
        scores: accuracies of nearest neighbours, fractions by name: `top1`, `top5`, `mean_class`.
        seconds: for which training stood still.
    """

    step: int
    scores: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Notice:
    """Something a person should know."""

    text: str


@dataclass(frozen=True)
class Stopping:
    """The run ends before its last step, as a rank was asked to; all that `step` steps have done is saved."""

    step: int
    reason: str


@dataclass(frozen=True)
class Restarted:
    """A run that had started before goes on.

    Attributes:
        cause: what ended it, one of the few words of `accounts.CAUSES`.
        attempt: restarts by the supervisor without progress, this one included; 0 where it was started by hand.
        lost_seconds: since the state was reached that it goes on from: steps to repeat, standstill, start-up.
        reason: the cause in a sentence.
        step: steps done in the state that it goes on from.
    """

    cause: str
    attempt: int
    lost_seconds: float
    reason: str
    step: int


@dataclass(frozen=True)
class Accounts:
    """What became of the time since the run first started, over all restarts.

    Attributes:
        goodput: productive share of the wall time.
        wall_seconds: since the first start.
        productive_seconds: of steps that count: taken, and not repeated since.
        lost_seconds: the rest, by what it went into: `starting`, `checkpoint`, `evaluation`, `skipped`, a restart's
            cause, `other`.
        restarts: how many, by cause.
    """

    goodput: float
    wall_seconds: float
    productive_seconds: float
    lost_seconds: dict[str, float]
    restarts: dict[str, int]


@dataclass(frozen=True)
class Finished:
    """All steps are done; `peak_bytes` is the most memory that this rank held."""

    step: int
    peak_bytes: int


@dataclass(frozen=True)
class Failed:
    """The run ends early, and why."""

    reason: str


Event = (
    Started
    | StepDone
    | StepSkipped
    | LossSpike
    | LoaderReport
    | CheckpointWritten
    | CheckpointFailed
    | CheckpointRefused
    | Evaluating
    | Evaluated
    | Notice
    | Stopping
    | Restarted
    | Accounts
    | Finished
    | Failed
)
Listener = Callable[[Event], None]


def tell(listeners: Iterable[Listener], event: Event) -> None:
    """Let every listener hear of an event, in order."""
    for listener in listeners:
        listener(event)

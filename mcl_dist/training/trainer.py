"""The training loop, and what a run is made of."""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from mcl_dist.batch import Batch
from mcl_dist.checkpoint import CheckpointManager, CheckpointShard, Progress, Snapshot, Tensors
from mcl_dist.config import choice, number
from mcl_dist.distributed.heartbeat import SAVING, STEPPING, Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup, sent_to
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.events import Finished, Listener, LossSpike, Notice, StepDone, StepSkipped, Stopping, tell
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training.anomalies import NonFiniteAttribution, SpikeDetector
from mcl_dist.training.async_scalars import AsyncScalars
from mcl_dist.training.deepspeed_engine import Engine
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_state import Statistics

LEAVING_SECONDS = 60.0  # for a checkpoint that is being written when something ends the run

Delivered = TypeVar("Delivered", bound=Batch)


@dataclass(frozen=True)
class TrainConfig:
    """Size and length of a run.

    Attributes:
        global_batch: videos a step, over all ranks.
        accumulate: parts that a rank's videos of a step come in, one after another: the memory of one part, the
            gradient of all. BatchNorm sees a part at a time.
        epochs: length of the run in passes over the set.
        steps: length in steps instead; wins over `epochs`.
        precision: of the encoders' forward and backward; losses and cosines are always float32.
        compile: the encoders by torch.compile, which takes a minute or two at the start.
        max_nonfinite_steps: steps without a finite loss and gradient in a row that end the run; single ones are
            skipped.
        on_spike: when the loss leaps, `ignore` it, `warn`, or `rollback` to the newest checkpoint and go on from there
            with the videos that come next: the same ones again would lead to the same place.
        spike_window: steps that tell what is usual.
        spike_factor: median absolute deviations above their median that make a leap.
    """

    global_batch: int = number(32, minimum=1)
    accumulate: int = number(1, minimum=1)
    epochs: int = number(400, minimum=1)
    steps: int | None = number(None, minimum=1)
    precision: str = choice("float32", "bfloat16")
    compile: bool = False
    max_nonfinite_steps: int = number(10, minimum=1)
    on_spike: str = choice("warn", "ignore", "rollback")
    spike_window: int = number(100, minimum=4)
    spike_factor: float = number(20.0, minimum=1)

    def batch_per_rank(self, num_ranks: int) -> int:
        """Videos a step on one rank.

        Raises:
            ConfigError: when the ranks, or the parts of their share, do not divide the global batch.
        """
        for count, what in ((num_ranks, "ranks"), (num_ranks * self.accumulate, "ranks x train.accumulate")):
            if self.global_batch % count:
                raise ConfigError(
                    f"train.global_batch: {self.global_batch} is not divisible by {count} {what}; "
                    f"set it to a multiple of {count}"
                )
        return self.global_batch // num_ranks


class TrainingState(Protocol):
    """What the steps of a run change, and its way into and out of checkpoints."""

    def share(
        self, step: int, optimizer: Tensors, config: dict[str, Any], progress: Progress, schedule: dict[str, Any]
    ) -> CheckpointShard:
        """This rank's share of a checkpoint, nothing copied; `optimizer` is its share of the optimizer's state."""

    def restore(self, snapshot: Snapshot, where: str) -> None:
        """Take over a snapshot; `UserError`, with `where` as its name, when it is of another architecture."""

    def misfit(self, snapshot: Snapshot) -> str | None:
        """The first tensor of a snapshot that is of another architecture, in words; None when all fit."""

    def statistics(self) -> Statistics:
        """BatchNorm statistics as they are now."""


@dataclass
class PendingStep:
    """A step that the device may still be at; what became of it is read once the next one is under way.

    Attributes:
        step: counted from 0.
        numbers: report, `gradient_norm`, `taken` and the seconds `waited`, means over ranks.
        suspects: to be asked if it was not taken.
        videos: in the global batch.
        clock: of its phases.
        queue_position: before its keys were written, where there is a queue.
        seconds: of wall time.
    """

    step: int
    numbers: AsyncScalars
    suspects: NonFiniteAttribution
    videos: int
    clock: PhaseTimer
    queue_position: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Trainer(ABC, Generic[Delivered]):
    """A run, put together: parts that step, data that feeds them, and who hears of it. What a step does is `take`.

    The host never waits for the step that the device is at: it reads what became of a step when the next one is on its
    way. A step that is not finite is undone on the device itself.

    Attributes:
        batches: endless, starting with the batch of step `start`.
        start: steps done before.
        progress: what was remembered of them.
        name_of: what people call a sample of `Batch.samples`.
        operations: floating-point operations that a video needs, for those who listen; 0 where nobody has counted.
        stop: whether this rank was asked to stop before the end.
        heartbeat: told what this rank is at.
    """

    engine: Engine
    learner: TrainingState
    group: ProcessGroup
    schedule: Schedule
    checkpoints: CheckpointManager
    checkpoint_every: int
    config: dict[str, Any]
    batches: Iterator[Delivered]
    settings: TrainConfig = field(default_factory=TrainConfig)
    listeners: Sequence[Listener] = ()
    start: int = 0
    progress: Progress = field(default_factory=Progress)
    name_of: Callable[[int], str] = str
    operations: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def __post_init__(self) -> None:
        self._pending: PendingStep | None = None
        self._is_stopping = False
        self._owes_checkpoint = False
        self._skipped_in_a_row = self.progress.skipped_in_a_row
        self._num_taken = self.progress.num_taken  # steps that were finite
        self._spikes = SpikeDetector(self.settings.spike_window, self.settings.spike_factor)
        self._spikes.remember(self.progress.recent_losses, is_high=self.progress.loss_is_high)
        self._spike: LossSpike | None = None

    def fit(self) -> bool:
        """Take all steps that remain, writing checkpoints on the way and at the end; False if a rank was asked to stop.

        Raises:
            UserError: when more steps are done than the run has, when too many in a row are not finite, or when too
                many checkpoints, or the last one, cannot be written.
        """
        self._check_length()
        with self.engine.gathered():
            self.checkpoints.reserve(self._share(self.start))
        try:
            is_done = self._train()
        finally:
            # Whatever ends the run, what is being written need not be torn.
            self._conclude(lambda: self.checkpoints.join(LEAVING_SECONDS))
        if is_done:
            tell(self.listeners, Finished(self.schedule.total_steps, peak_bytes(self.group.device)))
        return is_done

    def _check_length(self) -> None:
        """What was learnt in more steps, by another schedule, must not pass for this run's end."""
        total = self.schedule.total_steps
        if self.start > total:
            raise UserError(
                f"{self.checkpoints.step_url(self.start)}: {self.start} steps are done, and train.steps or "
                f"train.epochs make a run of {total}; set them to no less, or start another run in another run.dir"
            )

    def _train(self) -> bool:
        """Take all steps; False if a rank was asked to stop."""
        total = self.schedule.total_steps
        for step in range(self.start, total):
            started, clock = time.perf_counter(), PhaseTimer(self.group.device)
            self.heartbeat.begins_step(step)
            batch = next(self.batches)
            self.heartbeat.enters(STEPPING)
            clock.mark("wait")
            pending = self.take(step, batch, clock, waited=time.perf_counter() - started)
            clock.mark("other")
            pending.seconds = time.perf_counter() - started
            is_last = step + 1 == total
            is_due = self._owes_checkpoint or (step + 1) % self.checkpoint_every == 0
            if is_due or is_last or self._is_stopping:
                self._settle()
            if self._spike:
                is_due |= self._answer(self._spike)
            if is_due:
                self.save_soon(step + 1)
            self._hear()
            if not self._is_stopping:
                self._look(step + 1, is_last=is_last)
            if self._is_stopping and not is_last:
                self.save_and_wait(step + 1)
                tell(self.listeners, Stopping(step + 1, self.group.first_word(self.stop.reason or "")))
                return False
        self.save_and_wait(total)
        return True

    @abstractmethod
    def take(self, step: int, batch: Delivered, clock: PhaseTimer, waited: float) -> PendingStep:
        """One step, all of it in the device's hands on return; `waited` are the seconds that its batch took to come.

        Before it returns, it has what became of the step before found out, and remembers this one as pending.
        """

    def _look(self, step: int, *, is_last: bool) -> None:
        """What is done after `step` steps that changes nothing training goes by."""

    def _parts(self, num_videos: int) -> Iterator[slice]:
        """Where the parts that a rank's videos of a step come in begin and end."""
        for part in torch.arange(num_videos).chunk(self.settings.accumulate):
            yield slice(int(part[0]), int(part[-1]) + 1)

    def _mean(self, reports: list[dict[str, torch.Tensor]], waited: float) -> dict[str, torch.Tensor]:
        """Means over parts and ranks of the objective's report, of the seconds waited, and of who was asked to stop."""
        values = torch.stack([torch.stack([value.float() for value in report.values()]) for report in reports]).mean(0)
        own = sent_to(values.device, torch.tensor([waited, self.stop.is_asked]))
        means = self.group.mean(torch.cat([values, own]))
        return dict(zip([*reports[0], "waited", "stop"], means.unbind(), strict=True))

    def _settle(self) -> None:
        """Find out what became of the pending step, and tell.

        Raises:
            UserError: when it was the last of too many in a row that were skipped.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        report = pending.numbers.numbers()
        taken = report.pop("taken") > 0
        self._num_taken += taken
        self._is_stopping |= report.pop("stop") > 0  # the same on all ranks: they learn of it at the same step
        loss = report["loss"]
        tell(self.listeners, self._done(pending, report, taken=taken))
        if not taken:
            self._take_back(pending)
            self._skip(pending)
            return
        self._skipped_in_a_row = 0
        limit = self._spikes.limit_passed(loss)
        if limit is not None and self.settings.on_spike != "ignore":
            self._spike = LossSpike(pending.step + 1, loss, limit, None)

    def _take_back(self, pending: PendingStep) -> None:
        """Undo what the host has done of a step that the device did not take."""

    def _skip(self, pending: PendingStep) -> None:
        self._skipped_in_a_row += 1
        blame = pending.suspects.blame(self.group)
        names = [self.name_of(sample) for sample in blame.samples]
        tell(self.listeners, StepSkipped(pending.step + 1, names, blame.reason, self._skipped_in_a_row))
        if self._skipped_in_a_row >= self.settings.max_nonfinite_steps:
            raise UserError(
                f"step {pending.step + 1}: {self._skipped_in_a_row} steps in a row had no finite loss and gradient; "
                f"of the last one's videos, {', '.join(names)}: {blame.reason}; mend or remove these, or lower "
                "optimizer.learning_rate, and start again: it resumes from the last checkpoint"
            )

    def _answer(self, spike: LossSpike) -> bool:
        """Warn of a leap of the loss, or take back what led there; what came back needs a checkpoint of its own."""
        newest = None
        if self.settings.on_spike == "rollback":
            self.heartbeat.enters(SAVING)  # a slow store takes as long to read
            newest, _ = self.checkpoints.latest()
        if newest is not None:
            self._settle()
            self._roll_back(newest)
            self._spikes.forget()
            spike = replace(spike, rolled_back_to=newest)
        self._spike = None
        tell(self.listeners, spike)
        return newest is not None

    def _roll_back(self, step: int) -> None:
        """Bring back all that the checkpoint of a step holds; what videos come next stays as it is."""
        snapshot = self.checkpoints.load(step)
        with self.engine.gathered(changing=True):
            self.learner.restore(snapshot, self.checkpoints.step_url(step))
        self.engine.load_optimizer_state(snapshot.optimizer, step)

    def _done(self, pending: PendingStep, report: dict[str, float], *, taken: bool) -> StepDone:
        waited, gradient_norm = report.pop("waited"), report.pop("gradient_norm")
        return StepDone(
            step=pending.step + 1,
            epoch=pending.step // self.schedule.steps_per_epoch,
            total_steps=self.schedule.total_steps,
            losses=report,
            learning_rate=self.schedule.learning_rate(pending.step),
            videos=pending.videos,
            seconds=pending.seconds,
            data_wait_ratio=min(1.0, waited / pending.seconds),
            gradient_norm=gradient_norm,
            taken=taken,
            phases=pending.clock.seconds(),
            operations=float(self.operations * pending.videos),
        )

    def save_and_wait(self, step: int) -> None:
        """Have a complete checkpoint after `step` steps, which are all that were taken.

        Raises:
            UserError: when it cannot be written.
        """
        self.heartbeat.enters(SAVING)
        self._settle()
        self._conclude(self.checkpoints.wait)  # for the one being written, which may be this one
        if self.checkpoints.newest_step != step:
            self._save(step, time.perf_counter())
        self._conclude(self.checkpoints.finish)

    def save_soon(self, step: int) -> None:
        """Begin a checkpoint, or owe it while the store holds up the one before: training does not wait for stores."""
        self.heartbeat.enters(SAVING)
        self._settle()
        since = time.perf_counter()
        if not self.checkpoints.is_held_up():
            self._save(step, since)
        elif not self._owes_checkpoint:
            self._owes_checkpoint = True
            line = f"step {step}: the store holds up the checkpoint before; the next one is begun as soon as that ends"
            tell(self.listeners, Notice(line))

    def _save(self, step: int, since: float) -> None:
        """Begin a checkpoint, which a thread goes on to copy and to write; training stands still from `since` on."""
        self.heartbeat.enters(SAVING)
        self._conclude(self.checkpoints.wait)
        self._owes_checkpoint = False
        with self.engine.gathered():
            self.checkpoints.begin(self._share(step), since, network_lasts=not self.engine.shards_parameters)

    def _conclude(self, wait: Callable[[], None]) -> None:
        """Wait for the checkpoint that is being written, and tell what became of it."""
        try:
            wait()
        finally:
            self._hear()

    def _hear(self) -> None:
        for event in self.checkpoints.news():
            tell(self.listeners, event)

    def _share(self, step: int) -> CheckpointShard:
        losses, is_high = self._spikes.memory
        progress = Progress(losses, is_high, self._skipped_in_a_row, self._num_taken)
        return self.learner.share(step, self.engine.optimizer_share(), self.config, progress, asdict(self.schedule))


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: on a GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

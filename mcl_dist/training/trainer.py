"""The training loop."""

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch

from mcl_dist.batch import Batch
from mcl_dist.checkpoint import CheckpointManager, CheckpointShard, Progress
from mcl_dist.distributed.heartbeat import SAVING, STEPPING, Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.events import Finished, Listener, LossSpike, Notice, StepDone, StepSkipped, Stopping, emit
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training.anomalies import NonFiniteAttribution, SpikeDetector
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import Engine
from mcl_dist.training.pending_step import AsyncScalars, PendingStep, mean_report
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.training_state import TrainingState

LAST_WRITE_SECONDS = 60.0  # limit for a checkpoint that is being written when the run ends

BatchT = TypeVar("BatchT", bound=Batch)


@dataclass(kw_only=True)
class Trainer(ABC, Generic[BatchT]):
    """A training run. Subclasses implement `objective_inputs` and, where they need them, the hooks below it.

    The host never waits for the step that the device executes: it reads the result of a step after it has dispatched
    the next one. The device itself skips a step that is not finite.

    Attributes:
        run_config: configuration of the run, as checkpoints store it.
        batches: endless; the first is that of step `start`.
        start: number of steps done before.
        progress: as the checkpoint at `start` stores it.
        name_of: name of a sample of `Batch.samples`.
        flops_per_video: floating-point operations of a step for one video; 0 if unknown.
        stop: request to stop this rank before the end.
        num_taken: number of steps of the run that were finite.
    """

    engine: Engine
    state: TrainingState
    group: ProcessGroup
    schedule: Schedule
    checkpoints: CheckpointManager
    checkpoint_every: int
    run_config: dict[str, Any]
    batches: Iterator[BatchT]
    config: TrainConfig = field(default_factory=TrainConfig)
    listeners: Sequence[Listener] = ()
    start: int = 0
    progress: Progress = field(default_factory=Progress)
    name_of: Callable[[int], str] = str
    flops_per_video: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def __post_init__(self) -> None:
        self.num_taken = self.progress.num_taken
        self._pending: PendingStep | None = None
        self._is_stopping = False
        self._is_checkpoint_overdue = False
        self._skipped_in_a_row = self.progress.skipped_in_a_row
        self._spikes = SpikeDetector(self.config.spike_window, self.config.spike_factor)
        self._spikes.load_state(self.progress.recent_losses, is_high=self.progress.loss_is_high)
        self._spike: LossSpike | None = None

    def fit(self) -> bool:
        """Train to the last step, with checkpoints; False if a rank is asked to stop before.

        Raises:
            UserError: more steps are done than the run has, too many consecutive steps are not finite, or too many
                checkpoints, or the last one, cannot be written.
        """
        total = self.schedule.total_steps
        if self.start > total:
            raise UserError(
                f"{self.checkpoints.step_url(self.start)}: {self.start} steps are done, but the run has {total}; "
                f"set train.steps or train.epochs to {self.start} steps or more, or choose another run.dir"
            )
        with self.engine.gathered():
            self.checkpoints.reserve(self._shard(self.start))
        try:
            is_done = self._train()
        finally:
            # Even a run that fails completes the checkpoint that is being written.
            self._wait_for_checkpoint(lambda: self.checkpoints.join(LAST_WRITE_SECONDS))
        if is_done:
            emit(self.listeners, Finished(total, peak_bytes(self.group.device)))
        return is_done

    def _train(self) -> bool:
        """Train to the last step; False if a rank is asked to stop before."""
        total = self.schedule.total_steps
        for step in range(self.start, total):
            self._run_step(step)
            is_last = step + 1 == total
            is_due = self._is_checkpoint_overdue or (step + 1) % self.checkpoint_every == 0
            if is_due or is_last or self._is_stopping:
                self.finish_pending_step()
            if self._spike:
                is_due |= self._respond_to_spike(self._spike)
            if is_due:
                self.save_soon(step + 1)
            self._emit_checkpoint_events()
            if not self._is_stopping:
                self.maybe_evaluate(step + 1, is_last=is_last)
            if self._is_stopping and not is_last:
                self.save_and_wait(step + 1)
                emit(self.listeners, Stopping(step + 1, self.group.first_text(self.stop.reason or "")))
                return False
        self.save_and_wait(total)
        return True

    def _run_step(self, step: int) -> None:
        """Wait for the step's batch and dispatch the step."""
        started, timer = time.perf_counter(), PhaseTimer(self.group.device)
        self.heartbeat.start_step(step)
        batch = next(self.batches)
        self.heartbeat.enter_phase(STEPPING)
        timer.mark("wait")
        pending = self.train_step(step, batch, timer, waited=time.perf_counter() - started)
        timer.mark("other")
        pending.seconds = time.perf_counter() - started

    def train_step(self, step: int, batch: BatchT, timer: PhaseTimer, waited: float) -> PendingStep:
        """Dispatch a step to the device, finish the previous step, and return this one as pending.

        `timer` is marked at the end of each phase; `waited` is the seconds that this rank waited for the batch.
        """
        backup = self.state.back_up_statistics()
        timer.mark("other")
        reports = self._forward_backward(step, batch, timer)
        report = mean_report(reports, self.group, waited=waited, stop=self.stop.is_requested)
        timer.mark("other")
        self.checkpoints.wait_for_copy()  # the update changes what is being copied
        timer.mark("checkpoint")
        update = self.engine.step(report["loss"], self.schedule.learning_rate(step))
        self.after_update(step, update.taken)
        backup.restore_unless(update.taken)
        timer.mark("update")
        self.finish_pending_step()
        timer.mark("other")
        self.commit_step(update.taken)
        timer.mark("update")
        self._pending = PendingStep(
            step=step,
            scalars=AsyncScalars({**report, **update._asdict()}),
            non_finite=NonFiniteAttribution(batch, torch.stack([report["loss"] for report in reports])),
            num_videos=len(batch.samples) * self.group.size,
            timer=timer,
        )
        return self._pending

    def _forward_backward(self, step: int, batch: BatchT, timer: PhaseTimer) -> list[dict[str, torch.Tensor]]:
        """Forward and backward of every part of the batch; returns the objective's report of each."""
        reports = []
        for inputs in self.objective_inputs(step, batch, timer):
            loss = self.engine.forward(*inputs)
            timer.mark("forward")
            self.engine.backward(loss)
            timer.mark("backward")
            reports.append(self.engine.objective.report)
        return reports

    @abstractmethod
    def objective_inputs(self, step: int, batch: BatchT, timer: PhaseTimer) -> Iterator[tuple[Any, ...]]:
        """Yield the objective's inputs for each of the batch's `parts`."""

    def after_update(self, step: int, taken: torch.Tensor) -> None:
        """Update the state that follows the parameters; leave it as it is where `taken`, on the device, is 0."""

    def commit_step(self, taken: torch.Tensor) -> None:
        """Update the state whose position depends on whether the previous step was taken; that step is finished."""

    def revert_step(self) -> None:
        """Undo on the host the `commit_step` of the step that is being finished: the device skipped it."""

    def maybe_evaluate(self, step: int, *, is_last: bool) -> None:
        """Evaluate after `step` steps if it is due; the training state stays as it is."""

    def parts(self, num_videos: int) -> Iterator[slice]:
        """Split a rank's videos of a step into the parts of gradient accumulation."""
        for part in torch.arange(num_videos).chunk(self.config.accumulate):
            yield slice(int(part[0]), int(part[-1]) + 1)

    def finish_pending_step(self) -> None:
        """Read the result of the pending step, if there is one, and emit its events.

        Raises:
            UserError: too many consecutive steps were skipped.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        report = pending.scalars.wait()
        taken = report.pop("taken") > 0
        self.num_taken += taken
        self._is_stopping |= report.pop("stop") > 0  # a mean over ranks: all stop at the same step
        emit(self.listeners, self.step_event(pending, report, taken=taken))
        if taken:
            self._skipped_in_a_row = 0
            self._check_spike(pending.step, report["loss"])
        else:
            self.revert_step()
            self._skip(pending)

    def step_event(self, pending: PendingStep, report: dict[str, float], *, taken: bool) -> StepDone:
        """The event of a finished step; takes `waited` and `gradient_norm` out of the report."""
        waited, gradient_norm = report.pop("waited"), report.pop("gradient_norm")
        return StepDone(
            step=pending.step + 1,
            epoch=pending.step // self.schedule.steps_per_epoch,
            total_steps=self.schedule.total_steps,
            losses=report,
            learning_rate=self.schedule.learning_rate(pending.step),
            videos=pending.num_videos,
            seconds=pending.seconds,
            data_wait_ratio=min(1.0, waited / pending.seconds),
            gradient_norm=gradient_norm,
            taken=taken,
            phases=pending.timer.seconds(),
            flops=float(self.flops_per_video * pending.num_videos),
        )

    def _check_spike(self, step: int, loss: float) -> None:
        limit = self._spikes.observe(loss)
        if limit is not None and self.config.on_spike != "ignore":
            self._spike = LossSpike(step + 1, loss, limit, None)

    def _skip(self, pending: PendingStep) -> None:
        self._skipped_in_a_row += 1
        found = pending.non_finite.attribute(self.group)
        names = [self.name_of(sample) for sample in found.samples]
        emit(self.listeners, StepSkipped(pending.step + 1, names, found.reason, self._skipped_in_a_row))
        if self._skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"step {pending.step + 1}: {self._skipped_in_a_row} consecutive steps had no finite loss and gradient; "
                f"videos of the last one, {', '.join(names)}: {found.reason}; repair or remove them, or lower "
                "optimizer.learning_rate, and restart: the run resumes from the last checkpoint"
            )

    def _respond_to_spike(self, spike: LossSpike) -> bool:
        """Warn of a loss spike or roll back; True after a rollback, which needs a checkpoint of its own."""
        newest = None
        if self.config.on_spike == "rollback":
            self.heartbeat.enter_phase(SAVING)  # a slow store delays a read like a write
            newest, _ = self.checkpoints.latest()
        if newest is not None:
            self.finish_pending_step()
            self._roll_back(newest)
            self._spikes.reset()
            spike = replace(spike, rolled_back_to=newest)
        self._spike = None
        emit(self.listeners, spike)
        return newest is not None

    def _roll_back(self, step: int) -> None:
        """Restore the checkpoint of a step; the batches continue where they are."""
        snapshot = self.checkpoints.load(step)
        with self.engine.gathered(modify=True):
            self.state.restore(snapshot, self.checkpoints.step_url(step))
        self.engine.load_optimizer_state(snapshot.optimizer, step)

    def save_and_wait(self, step: int) -> None:
        """Complete a checkpoint after `step` steps, which must be the last steps taken.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        self.heartbeat.enter_phase(SAVING)
        self.finish_pending_step()
        self._wait_for_checkpoint(self.checkpoints.wait)  # this may be the checkpoint of `step`
        if self.checkpoints.newest_step != step:
            self._begin_save(step, time.perf_counter())
        self._wait_for_checkpoint(self.checkpoints.finish)

    def save_soon(self, step: int) -> None:
        """Begin a checkpoint; mark it as overdue while the store delays the one before, and continue training."""
        self.heartbeat.enter_phase(SAVING)
        self.finish_pending_step()
        since = time.perf_counter()
        if not self.checkpoints.wait_unless_store_fails():
            self._begin_save(step, since)
        elif not self._is_checkpoint_overdue:
            self._is_checkpoint_overdue = True
            line = f"step {step}: the store delays the previous checkpoint; the next one begins when that one ends"
            emit(self.listeners, Notice(line))

    def _begin_save(self, step: int, since: float) -> None:
        """Begin a checkpoint, which a thread copies and writes; training has stood still since `since`."""
        self.heartbeat.enter_phase(SAVING)
        self._wait_for_checkpoint(self.checkpoints.wait)
        self._is_checkpoint_overdue = False
        with self.engine.gathered():
            self.checkpoints.begin_save(self._shard(step), since, defer_network=not self.engine.shards_parameters)

    def _wait_for_checkpoint(self, wait: Callable[[], None]) -> None:
        """Wait for the checkpoint that is being written, and emit its events even if it failed."""
        try:
            wait()
        finally:
            self._emit_checkpoint_events()

    def _emit_checkpoint_events(self) -> None:
        for event in self.checkpoints.pop_events():
            emit(self.listeners, event)

    def _shard(self, step: int) -> CheckpointShard:
        losses, is_high = self._spikes.state
        progress = Progress(losses, is_high, self._skipped_in_a_row, self.num_taken)
        return self.state.shard(step, self.engine.optimizer_shard(), self.run_config, progress, asdict(self.schedule))


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

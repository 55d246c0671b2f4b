"""The training step of MCL pre-training."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.distributed.heartbeat import EVALUATING
from mcl_dist.events import Evaluated, StepDone, emit
from mcl_dist.model.encoder import Encoder, normalise
from mcl_dist.objective.momentum_encoder import NUM_KEYS
from mcl_dist.objective.objective import ObjectiveConfig
from mcl_dist.training.pending_step import PendingStep
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.trainer import Trainer

Evaluate = Callable[[Encoder, int], dict[str, float] | None]


@dataclass(kw_only=True)
class PretrainTrainer(Trainer[TubeletBatch]):
    """Pre-training: queries against keys and the queue of negatives.

    Attributes:
        losses: configuration of the objective.
        evaluate: called by all ranks with an encoder and the number of steps done; returns scores on the first rank,
            if there are any. It must not change the training state.
        evaluate_every: steps between evaluations; None for no evaluation.
    """

    state: PretrainState
    losses: ObjectiveConfig
    evaluate: Evaluate = lambda *_: None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._new_keys: torch.Tensor  # inter keys of all ranks, until they are enqueued
        self._queue_position: int  # before the pending step's keys

    def objective_inputs(self, step: int, batch: TubeletBatch, timer: PhaseTimer) -> Iterator[tuple[Any, ...]]:
        """Encode the keys, then yield `Objective.forward`'s inputs part by part."""
        keys = self.state.momentum.encode(batch.views, step, timer.mark)
        timer.mark("keys")
        self._new_keys = keys.inter_all
        weights = self.schedule.loss_weights(step, self.losses)
        for part in self.parts(len(batch.order)):
            clips = normalise(batch.views[part, QUERY])
            yield clips, keys.select(part), self.state.queue, batch.motion[part], batch.order[part], weights

    def after_update(self, step: int, taken: torch.Tensor) -> None:
        """Update the momentum encoder."""
        with self.engine.gathered():
            parameters = self.state.network.parameters()
            self.state.momentum.update(parameters, self.schedule.momentum(step, self.losses), taken)

    def commit_step(self, taken: torch.Tensor) -> None:
        """Enqueue the keys."""
        self._queue_position = self.state.queue.position
        self.state.queue.enqueue(self._new_keys, taken)

    def revert_step(self) -> None:
        """Move the queue back to where it was before the step's keys."""
        self.state.queue.position = self._queue_position

    def maybe_evaluate(self, step: int, *, is_last: bool) -> None:
        """Evaluate the query encoder after `step` steps if it is due."""
        if not self.evaluate_every or not (is_last or step % self.evaluate_every == 0):
            return
        self.finish_pending_step()
        self.heartbeat.enter_phase(EVALUATING)
        since = time.perf_counter()
        with self.engine.gathered():
            encoder = self.state.frozen_encoder(self.group)
        scores = self.evaluate(encoder, step)
        if scores is not None:
            emit(self.listeners, Evaluated(step, scores, time.perf_counter() - since))

    def step_event(self, pending: PendingStep, report: dict[str, float], *, taken: bool) -> StepDone:
        """The event of a finished step, with the state of momentum and queue."""
        num_enqueued, size = self.num_taken * NUM_KEYS * pending.num_videos, self.state.queue.size
        return replace(
            super().step_event(pending, report, taken=taken),
            momentum=self.schedule.momentum(pending.step, self.losses),
            queue_fill=1.0 if self.losses.fill_queue else min(1.0, num_enqueued / size),
            queue_age=min(num_enqueued, size) / (NUM_KEYS * pending.num_videos),
        )

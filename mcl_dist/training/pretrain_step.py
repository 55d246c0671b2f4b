"""The steps of pre-training, and what they are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.distributed.heartbeat import EVALUATING
from mcl_dist.events import Evaluated, StepDone, tell
from mcl_dist.model.encoder import Encoder, normalise
from mcl_dist.objective.momentum_encoder import NUM_KEYS, Keys
from mcl_dist.objective.objective import ObjectiveConfig
from mcl_dist.training.anomalies import NonFiniteAttribution
from mcl_dist.training.async_scalars import AsyncScalars
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_state import PretrainState
from mcl_dist.training.trainer import PendingStep, Trainer

Evaluate = Callable[[Encoder, int], dict[str, float] | None]


@dataclass(kw_only=True)
class PretrainTrainer(Trainer[TubeletBatch]):
    """A run of pre-training: query against keys and queue, as `losses` says.

    Attributes:
        evaluate: scores an encoder after so many steps, all ranks together; the first has the scores, where there are
            any. It leaves all that training goes by as it is.
        evaluate_every: steps from one evaluation to the next; None: there is none.
    """

    learner: PretrainState
    losses: ObjectiveConfig
    evaluate: Evaluate = lambda *_: None
    evaluate_every: int | None = None

    def take(self, step: int, batch: TubeletBatch, clock: PhaseTimer, waited: float) -> PendingStep:
        """One step, all of it in the device's hands on return; `waited` are the seconds that its batch took to come."""
        statistics = self.learner.statistics()
        clock.mark("other")
        keys = self.learner.momentum.encode(batch.views, step, clock.mark)
        clock.mark("keys")
        reports = self._backward(step, batch, keys, clock)
        report = self._mean(reports, waited)
        clock.mark("other")
        self.checkpoints.await_copy()  # of what the update changes
        clock.mark("checkpoint")
        update = self.engine.step(report["loss"], self.schedule.learning_rate(step))
        with self.engine.gathered():
            parameters = self.learner.network.parameters()
            self.learner.momentum.update(parameters, self.schedule.momentum(step, self.losses), update.taken)
        statistics.put_back_unless(update.taken)
        clock.mark("update")
        self._settle()  # the step before: whether it was taken says where these keys go
        clock.mark("other")
        position = self.learner.queue.position
        self.learner.queue.enqueue(keys.inter_all, update.taken)
        clock.mark("update")
        self._pending = PendingStep(
            step=step,
            numbers=AsyncScalars({**report, **update._asdict()}),
            suspects=NonFiniteAttribution(batch, torch.stack([report["loss"] for report in reports])),
            videos=len(batch.order) * self.group.size,
            clock=clock,
            queue_position=position,
        )
        return self._pending

    def _backward(self, step: int, batch: TubeletBatch, keys: Keys, clock: PhaseTimer) -> list[dict[str, torch.Tensor]]:
        """Forward and backward of every part of the batch; the objective's report of each."""
        weights = self.schedule.loss_weights(step, self.losses)
        reports = []
        for own in self._parts(len(batch.order)):
            clips = normalise(batch.views[own, QUERY])
            loss = self.engine.forward(
                clips, keys.of(own), self.learner.queue, batch.motion[own], batch.order[own], weights
            )
            clock.mark("forward")
            self.engine.backward(loss)
            clock.mark("backward")
            reports.append(self.engine.objective.report)
        return reports

    def _look(self, step: int, *, is_last: bool) -> None:
        """Score the query encoder as it is after `step` steps, where that is due, and tell."""
        if not self.evaluate_every or not (is_last or step % self.evaluate_every == 0):
            return
        self._settle()
        self.heartbeat.enters(EVALUATING)
        since = time.perf_counter()
        with self.engine.gathered():
            encoder = self.learner.frozen_encoder(self.group)
        scores = self.evaluate(encoder, step)
        if scores is not None:
            tell(self.listeners, Evaluated(step, scores, time.perf_counter() - since))

    def _take_back(self, pending: PendingStep) -> None:
        self.learner.queue.position = pending.queue_position

    def _done(self, pending: PendingStep, report: dict[str, float], *, taken: bool) -> StepDone:
        written, size = self._num_taken * NUM_KEYS * pending.videos, self.learner.queue.size
        return replace(
            super()._done(pending, report, taken=taken),
            momentum=self.schedule.momentum(pending.step, self.losses),
            queue_fill=1.0 if self.losses.fill_queue else min(1.0, written / size),
            queue_age=min(written, size) / (NUM_KEYS * pending.videos),
        )

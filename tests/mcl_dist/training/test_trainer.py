"""The training loop around a fake engine, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from mcl_dist.batch import Batch
from mcl_dist.checkpoint import CheckpointManager, CheckpointShard, Progress
from mcl_dist.distributed.heartbeat import SAVING, Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.events import Event, Finished, LossSpike, StepDone
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import Update
from mcl_dist.training.pending_step import mean_report
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.trainer import Trainer

STEPS = 4
BATCH = Batch(views=torch.zeros(2, 1), samples=torch.arange(2), boxes=torch.zeros(2, 1, 4))


class FakeTrainer(Trainer[Batch]):
    """A trainer without inputs, on a mock engine that reports a loss of 9."""

    def objective_inputs(self, step: int, batch: Batch, timer: PhaseTimer) -> Iterator[tuple[Any, ...]]:  # noqa: ARG002
        for _ in self.parts(len(batch.samples)):
            yield ()


def shard(step: int, *_: Any) -> CheckpointShard:
    return CheckpointShard(step, {"weight": torch.full((2,), float(step))})


def build_trainer(folder: Path, start: int, events: list[Event], **arguments: Any) -> FakeTrainer:
    """A trainer after `start` steps, with their checkpoint."""
    group = arguments.pop("group", ProcessGroup())
    checkpoints = CheckpointManager(str(folder), group)
    if start:
        checkpoints.save(shard(start))
        checkpoints.pop_events()
    engine: Any = Mock(objective=Mock(report={"loss": torch.tensor(9.0)}), shards_parameters=False)
    engine.gathered.side_effect = lambda **_: nullcontext()
    engine.step.return_value = Update(torch.tensor(1.0), torch.tensor(0.5))
    engine.optimizer_shard.return_value = {}
    return FakeTrainer(
        engine=engine,
        state=Mock(shard=shard),
        group=group,
        schedule=Schedule(0.1, steps_per_epoch=2, total_steps=STEPS, warmup_epochs=1.0),
        checkpoints=checkpoints,
        checkpoint_every=STEPS,
        run_config={},
        batches=itertools.repeat(BATCH),
        listeners=[events.append],
        start=start,
        **arguments,
    )


def test_a_run_shorter_than_its_checkpoint_is_rejected_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    events: list[Event] = []
    CheckpointManager(str(tmp_path), ProcessGroup()).save(shard(STEPS))
    trainer = build_trainer(tmp_path, STEPS + 2, events)
    with pytest.raises(UserError, match=r"step-000000006: 6 steps are done, but the run has 4; set train\.steps"):
        trainer.fit()
    assert not [event for event in events if isinstance(event, Finished)]
    assert trainer.checkpoints.load(STEPS).network["weight"].tolist() == [STEPS, STEPS]


def test_a_completed_run_finishes_again_without_another_checkpoint(tmp_path: Path) -> None:
    events: list[Event] = []
    assert build_trainer(tmp_path, STEPS, events).fit()
    assert [type(event) for event in events] == [Finished]


def test_a_step_is_reported_after_the_update_of_the_next_step(tmp_path: Path) -> None:
    events: list[Event] = []
    trainer = build_trainer(tmp_path, 0, events)
    engine: Any = trainer.engine
    num_updates: list[int] = []
    trainer.listeners = [lambda _: num_updates.append(engine.step.call_count)]
    for step in range(3):
        trainer.train_step(step, BATCH, PhaseTimer(trainer.group.device), waited=0.0).seconds = 1.0
    trainer.finish_pending_step()
    trainer.finish_pending_step()  # there is none
    assert num_updates == [2, 3, 3]


def test_every_part_of_a_batch_has_its_own_forward_and_backward(tmp_path: Path) -> None:
    events: list[Event] = []
    trainer = build_trainer(tmp_path, STEPS - 1, events, config=TrainConfig(accumulate=2))
    trainer.fit()
    engine: Any = trainer.engine
    assert engine.forward.call_count == engine.backward.call_count == 2
    assert [event.losses for event in events if isinstance(event, StepDone)] == [{"loss": 9.0}]


def test_a_rollback_has_the_heartbeat_of_saving_while_it_reads_the_store(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    config, events = TrainConfig(on_spike="rollback", spike_window=4), list[Event]()
    progress = Progress(recent_losses=(1.0, 1.0, 1.0, 1.0))
    trainer = build_trainer(tmp_path, STEPS - 1, events, config=config, heartbeat=heartbeat, progress=progress)
    calls = Mock()
    calls.enter_phase, calls.latest = Mock(wraps=heartbeat.enter_phase), Mock(wraps=trainer.checkpoints.latest)
    heartbeat.enter_phase = calls.enter_phase  # type: ignore[method-assign]
    trainer.checkpoints.latest = calls.latest  # type: ignore[method-assign]
    trainer.fit()
    assert [event.rolled_back_to for event in events if isinstance(event, LossSpike)] == [STEPS - 1]
    position = calls.mock_calls.index(call.latest())
    assert calls.mock_calls[position - 1] == call.enter_phase(SAVING)


@pytest.mark.gpu
def test_averaging_the_reports_of_a_step_does_not_wait_for_the_gpu() -> None:
    device = torch.device("cuda")
    reports = [{"loss": torch.full((), value, device=device)} for value in (1.0, 2.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = mean_report(reports, ProcessGroup(device), waited=0.25, stop=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {name: float(mean) for name, mean in means.items()} == {"loss": 1.5, "waited": 0.25, "stop": 0.0}

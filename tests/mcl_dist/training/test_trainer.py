"""The training loop around steps that do nothing, in this process."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcl_dist.checkpoint import CheckpointManager, CheckpointShard
from mcl_dist.distributed.heartbeat import SAVING, Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.events import Event, Finished, LossSpike
from mcl_dist.objective.schedule import Schedule
from mcl_dist.training.trainer import TrainConfig, Trainer

STEPS = 4


class Idle(Trainer[Any]):
    """A run that learns nothing, and whose loss leaps in its last step."""

    def take(self, step: int, *_: Any, **__: Any) -> Any:
        if step + 1 == STEPS:
            self._spike = LossSpike(STEPS, 9.0, 1.0, None)
        return SimpleNamespace(seconds=0.0)


def share(step: int, *_: Any) -> CheckpointShard:
    return CheckpointShard(step, {"weight": torch.full((2,), float(step))})


def put_together(folder: Path, start: int, heard: list[Event], **parts: Any) -> Idle:
    """A run after `start` steps, which a checkpoint holds."""
    group = parts.pop("group", ProcessGroup())
    checkpoints = CheckpointManager(str(folder), group)
    if start:
        checkpoints.save(share(start))
    engine: Any = SimpleNamespace(
        gathered=lambda **_: nullcontext(),
        optimizer_share=dict,
        load_optimizer_state=lambda *_: None,
        shards_parameters=False,
    )
    learner: Any = SimpleNamespace(share=share, restore=lambda *_: None)
    return Idle(
        engine=engine,
        learner=learner,
        group=group,
        schedule=Schedule(0.1, steps_per_epoch=2, total_steps=STEPS, warmup_epochs=1.0),
        checkpoints=checkpoints,
        checkpoint_every=STEPS,
        config={},
        batches=itertools.repeat(None),
        listeners=[heard.append],
        start=start,
        **parts,
    )


def test_a_run_shorter_than_what_is_done_is_refused_and_no_checkpoint_touched(tmp_path: Path) -> None:
    heard: list[Event] = []
    CheckpointManager(str(tmp_path), ProcessGroup()).save(share(STEPS))
    trainer = put_together(tmp_path, STEPS + 2, heard)
    with pytest.raises(UserError, match=r"step-000000006: 6 steps are done, and train\.steps or .* of 4; set"):
        trainer.fit()
    assert not [event for event in heard if isinstance(event, Finished)]
    assert trainer.checkpoints.load(STEPS).network["weight"].tolist() == [STEPS, STEPS]


def test_a_run_that_is_done_is_finished_again_without_another_checkpoint(tmp_path: Path) -> None:
    heard: list[Event] = []
    trainer = put_together(tmp_path, STEPS, heard)
    trainer.checkpoints.news()
    assert trainer.fit()
    assert [type(event) for event in heard] == [Finished]


def test_a_store_that_is_slow_when_a_leap_takes_back_steps_is_waited_for_as_when_saving(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    settings, heard = TrainConfig(on_spike="rollback"), list[Event]()
    trainer = put_together(tmp_path, STEPS - 1, heard, settings=settings, heartbeat=heartbeat)
    latest, phases = trainer.checkpoints.latest, []

    def noted() -> Any:
        phases.append(heartbeat._at[1])
        return latest()

    trainer.checkpoints.latest = noted  # type: ignore[method-assign]
    trainer.fit()
    assert [event.rolled_back_to for event in heard if isinstance(event, LossSpike)] == [STEPS - 1]
    assert phases == [SAVING]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_to_average_what_a_step_reports(tmp_path: Path) -> None:
    device = torch.device("cuda")
    trainer = put_together(tmp_path, 0, [], group=ProcessGroup(device))
    reports = [{"loss": torch.full((), value, device=device)} for value in (1.0, 2.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = trainer._mean(reports, waited=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {name: float(mean) for name, mean in means.items()} == {"loss": 1.5, "waited": 0.25, "stop": 0.0}

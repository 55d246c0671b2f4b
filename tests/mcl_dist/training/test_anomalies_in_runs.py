"""Non-finite steps and loss spikes in whole runs on two gloo ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from dataloading.reading.shard_set import ShardSet
from launch.pretraining.compose import compose_trainer
from launch.run.config import PretrainConfig
from launch.run.parts import RankContext
from mcl_dist.batch import FIRST_KEY, QUERY, TubeletBatch
from mcl_dist.config import load_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.events import Event, LossSpike, StepDone, StepSkipped
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import OptimizerConfig, join_process_group, pick_device
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_step import PretrainTrainer
from tests.support.gloo_runs import IGNORE_SPIKES, STEPS, build_trainer, join_ranks, noise
from tests.support.paths import REPOSITORY

SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
POISONED_STEP = 3
STATE_FILES = (
    "network",
    "momentum",
    *(f"{of}-0000{rank}" for of in ("optimizer", "queue", "statistics") for rank in (0, 1)),
)
CULPRIT = 2  # of four videos: on the second of two ranks


def poisoned(group: ProcessGroup, start: int, steps: Collection[int], view: int) -> Iterator[TubeletBatch]:
    """Noise as floats, with a NaN pixel in one view of one video in some steps."""
    for step, batch in enumerate(noise(group, start), start):
        views = batch.views.float()
        if step in steps:
            views[batch.samples == CULPRIT, view, 1, 2, 3, 0] = torch.nan
        yield replace(batch, views=views)


class OmittingTrainer(PretrainTrainer):
    """A trainer that omits some steps."""

    omitted: Collection[int] = ()

    def train_step(self, step: int, batch: TubeletBatch, timer: PhaseTimer, waited: float) -> Any:
        if step not in self.omitted:
            return super().train_step(step, batch, timer, waited)
        self.finish_pending_step()
        return SimpleNamespace(seconds=0.0)


def run(
    folder: Path,
    group: ProcessGroup,
    optimizer: OptimizerConfig,
    *,
    poison: Collection[int] = (),
    omitted: Collection[int] = (),
    view: int = QUERY,
    config: TrainConfig = IGNORE_SPIKES,
    steps: int = STEPS,
) -> list[Event]:
    """The events of a run."""
    trainer = build_trainer(
        folder,
        group,
        optimizer,
        lambda start: poisoned(group, start, poison, view),
        type("", (OmittingTrainer,), {"omitted": omitted}),
        config,
        steps,
    )
    events: list[Event] = []
    trainer.listeners = [events.append]
    trainer.fit()
    return events


def files(folder: Path, step: int) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / f"checkpoints/step-{step:09d}").iterdir()}


def train_with_skipped_step(folder: str) -> None:
    group = join_ranks()
    for optimizer, stage, step, view in (
        ("sgd", 0, 3, FIRST_KEY),
        ("adamw", 1, 0, QUERY),
        ("sgd", 2, 3, QUERY),
        ("adamw", 3, 3, QUERY),
    ):
        config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=stage)
        skipped, omitted = Path(folder, f"{stage}-skipped"), Path(folder, f"{stage}-omitted")
        events = run(skipped, group, config, poison=[step], view=view)
        assert [event for event in events if isinstance(event, StepSkipped)] == [
            StepSkipped(step + 1, [str(CULPRIT)], "non-finite pixels or motion target", 1)
        ]
        assert [event.step for event in events if isinstance(event, StepDone) and not event.taken] == [step + 1]
        run(omitted, group, config, omitted=[step])
        group.barrier()
        assert files(skipped, STEPS) == files(omitted, STEPS), f"stage {stage}"


def train_on_videos(shards: str, folder: str, omitted: str) -> None:
    """Train as `mcl pretrain` does; in one step, omitted or not, a video of the second rank has a NaN pixel."""
    device = pick_device()
    arguments = [f"data.train={shards}", f"run.dir={folder}", "train.steps=6", "checkpoint.every=6", *SMALL]
    config = load_config(PretrainConfig, REPOSITORY / "configs" / "pretrain" / "tiny.yaml", arguments)
    join_process_group(device)
    group = ProcessGroup(device)
    with compose_trainer(config, RankContext(group, StopRequest(), Heartbeat(), StartInfo(0.0))) as trainer:
        train_step, batches = trainer.train_step, trainer.batches

        def poisoned_batches() -> Iterator[TubeletBatch]:
            for step, batch in enumerate(batches):
                views = batch.views.float()
                if step == POISONED_STEP and not group.is_first:
                    views[0, QUERY, 1, 2, 3, 0] = torch.nan
                    Path(folder, "culprit").write_text(ShardSet(shards).name_of(int(batch.samples[0])))
                yield replace(batch, views=views)

        def train_other_steps(step: int, batch: TubeletBatch, timer: PhaseTimer, waited: float) -> Any:
            if step != POISONED_STEP:
                return train_step(step, batch, timer, waited)
            trainer.finish_pending_step()
            return SimpleNamespace(seconds=0.0)

        if omitted == "True":
            trainer.train_step = train_other_steps  # type: ignore[method-assign]
        else:
            trainer.batches = poisoned_batches()
        trainer.fit()


def train_until_failure(folder: str) -> None:
    group = join_ranks()
    with pytest.raises(UserError, match=f"step 5: 2 consecutive steps .* {CULPRIT}: non-finite pixels"):
        run(Path(folder), group, OptimizerConfig(), poison=[1, 3, 4, 5], config=TrainConfig(max_nonfinite_steps=2))


def train_with_rollback(folder: str) -> None:
    """The loss rises throughout: the network cannot learn this noise at this rate."""
    group = join_ranks()
    config = TrainConfig(on_spike="rollback", spike_window=4, spike_factor=1.0)
    for name, stage in (("adamw", 0), ("sgd", 1), ("adamw", 2), ("sgd", 3)):
        optimizer = OptimizerConfig(name=name, learning_rate=0.01, zero_stage=stage)
        rolled_back, omitted = Path(folder, f"{stage}-rolled-back"), Path(folder, f"{stage}-omitted")
        events = run(rolled_back, group, optimizer, config=config, steps=8)
        (spike,) = [event for event in events if isinstance(event, LossSpike)]
        assert spike.loss > spike.limit
        assert spike.rolled_back_to == 3
        assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 9))
        run(omitted, group, optimizer, omitted=range(3, spike.step + 1), steps=8)
        group.barrier()
        for file, data in files(rolled_back, 8).items():
            # The recent losses in the state differ: the other run has no spike.
            assert file in ("state.json", "COMMITTED") or data == files(omitted, 8)[file], f"stage {stage}, {file}"


@pytest.mark.slow
def test_a_non_finite_step_is_attributed_and_equals_an_omitted_step(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "train_with_skipped_step", 2, tmp_path)


@pytest.mark.slow
def test_a_nan_pixel_costs_a_run_on_videos_only_one_step(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    for omitted in (False, True):
        run_ranks(__file__, "train_on_videos", 2, synthetic_shards, tmp_path / str(omitted), omitted)
    skipped, expected = (files(tmp_path / str(omitted), 6) for omitted in (False, True))
    for name in STATE_FILES:
        assert skipped[f"{name}.safetensors"] == expected[f"{name}.safetensors"], name
    culprit = (tmp_path / "False" / "culprit").read_text()
    for log in ("log.jsonl", "log-00001.jsonl"):
        events = [json.loads(line) for line in (tmp_path / "False" / log).read_text().splitlines()]
        (event,) = [event for event in events if event["event"] == "StepSkipped"]
        assert (event["step"], event["in_a_row"]) == (POISONED_STEP + 1, 1)
        assert event["samples"] == [culprit]
    lines = [json.loads(line) for line in (tmp_path / "False" / "metrics.jsonl").read_text().splitlines()]
    assert [line["taken"] for line in lines] == [True, True, True, False, True, True]


@pytest.mark.slow
def test_a_run_fails_after_too_many_consecutive_nan_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_until_failure", 2, tmp_path)


@pytest.mark.slow
def test_after_a_loss_spike_the_last_checkpoint_continues_with_the_next_videos(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "train_with_rollback", 2, tmp_path)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo's teardown sometimes aborts

"""Steps that are not finite, and losses that leap, in whole runs on two gloo ranks."""

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
from launch.pretraining.compose import assembled
from launch.run.config import PretrainConfig
from mcl_dist.batch import FIRST_KEY, QUERY, TubeletBatch
from mcl_dist.config import load_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.events import Event, LossSpike, StepDone, StepSkipped
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.training.deepspeed_engine import OptimizerConfig, join_process_group, pick_device
from mcl_dist.training.phase_timer import PhaseTimer
from mcl_dist.training.pretrain_step import PretrainTrainer
from mcl_dist.training.trainer import TrainConfig
from tests.support.gloo_runs import QUIET, STEPS, joined, noise, put_together
from tests.support.paths import REPOSITORY

SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
POISONED_STEP = 3
LEARNT = (
    "network",
    "momentum",
    *(f"{of}-0000{rank}" for of in ("optimizer", "queue", "statistics") for rank in (0, 1)),
)
CULPRIT = 2  # of four videos: on the second of two ranks


def poisoned(group: ProcessGroup, start: int, steps: Collection[int], view: int) -> Iterator[TubeletBatch]:
    """Noise as floats, and in some steps one pixel of one video's view that is no number."""
    for step, batch in enumerate(noise(group, start), start):
        views = batch.views.float()
        if step in steps:
            views[batch.samples == CULPRIT, view, 1, 2, 3, 0] = torch.nan
        yield replace(batch, views=views)


class LeavingOut(PretrainTrainer):
    """A run without some of its steps."""

    left_out: Collection[int] = ()

    def take(self, step: int, batch: TubeletBatch, clock: PhaseTimer, waited: float) -> Any:
        if step not in self.left_out:
            return super().take(step, batch, clock, waited)
        self._settle()
        return SimpleNamespace(seconds=0.0)


def run(
    folder: Path,
    group: ProcessGroup,
    optimizer: OptimizerConfig,
    *,
    poison: Collection[int] = (),
    left_out: Collection[int] = (),
    view: int = QUERY,
    settings: TrainConfig = QUIET,
    steps: int = STEPS,
) -> list[Event]:
    """What the listeners of a run heard."""
    trainer = put_together(
        folder,
        group,
        optimizer,
        lambda start: poisoned(group, start, poison, view),
        type("", (LeavingOut,), {"left_out": left_out}),
        settings,
        steps,
    )
    heard: list[Event] = []
    trainer.listeners = [heard.append]
    trainer.fit()
    return heard


def files(folder: Path, step: int) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / f"checkpoints/step-{step:09d}").iterdir()}


def skipping(folder: str) -> None:
    group = joined()
    for optimizer, stage, step, view in (
        ("sgd", 0, 3, FIRST_KEY),
        ("adamw", 1, 0, QUERY),
        ("sgd", 2, 3, QUERY),
        ("adamw", 3, 3, QUERY),
    ):
        config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=stage)
        hurt, whole = Path(folder, f"{stage}-hurt"), Path(folder, f"{stage}-whole")
        heard = run(hurt, group, config, poison=[step], view=view)
        assert [event for event in heard if isinstance(event, StepSkipped)] == [
            StepSkipped(step + 1, [str(CULPRIT)], "its pixels or its motion target are not finite", 1)
        ]
        assert [event.step for event in heard if isinstance(event, StepDone) and not event.taken] == [step + 1]
        run(whole, group, config, left_out=[step])
        group.barrier()
        assert files(hurt, STEPS) == files(whole, STEPS), f"stage {stage}"


def on_videos(shards: str, folder: str, left_out: str) -> None:
    """A run as `mcl pretrain` puts it together; a pixel of one video of the second rank's is no number in one step."""
    device = pick_device()
    words = [f"data.train={shards}", f"run.dir={folder}", "train.steps=6", "checkpoint.every=6", *SMALL]
    config = load_config(PretrainConfig, REPOSITORY / "configs" / "pretrain" / "tiny.yaml", words)
    join_process_group(device)
    group = ProcessGroup(device)
    with assembled(config, group, device, StopRequest(), Heartbeat(), StartInfo(0.0)) as trainer:
        take, batches = trainer.take, trainer.batches

        def poisoned_batches() -> Iterator[TubeletBatch]:
            for step, batch in enumerate(batches):
                views = batch.views.float()
                if step == POISONED_STEP and not group.is_first:
                    views[0, QUERY, 1, 2, 3, 0] = torch.nan
                    Path(folder, "culprit").write_text(ShardSet(shards).name_of(int(batch.samples[0])))
                yield replace(batch, views=views)

        def take_others(step: int, batch: TubeletBatch, clock: PhaseTimer, waited: float) -> Any:
            if step != POISONED_STEP:
                return take(step, batch, clock, waited)
            trainer._settle()
            return SimpleNamespace(seconds=0.0)

        if left_out == "True":
            trainer.take = take_others  # type: ignore[method-assign]
        else:
            trainer.batches = poisoned_batches()
        trainer.fit()


def stopping(folder: str) -> None:
    group = joined()
    with pytest.raises(UserError, match=f"step 5: 2 steps in a row .* {CULPRIT}: its pixels"):
        run(Path(folder), group, OptimizerConfig(), poison=[1, 3, 4, 5], settings=TrainConfig(max_nonfinite_steps=2))


def going_back(folder: str) -> None:
    """The loss rises all the way, as it does on noise that the network cannot learn at this rate."""
    group = joined()
    settings = TrainConfig(on_spike="rollback", spike_window=4, spike_factor=1.0)
    for optimizer, stage in (("adamw", 0), ("sgd", 1), ("adamw", 2), ("sgd", 3)):
        config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=stage)
        leapt, calm = Path(folder, f"{stage}-leapt"), Path(folder, f"{stage}-calm")
        heard = run(leapt, group, config, settings=settings, steps=8)
        (spike,) = [event for event in heard if isinstance(event, LossSpike)]
        assert spike.loss > spike.limit
        assert spike.rolled_back_to == 3
        assert [event.step for event in heard if isinstance(event, StepDone)] == list(range(1, 9))
        run(calm, group, config, left_out=range(3, spike.step + 1), steps=8)
        group.barrier()
        for name, data in files(leapt, 8).items():
            # What is remembered of the losses differs: the calm run never had the leap.
            assert name in ("state.json", "COMMITTED") or data == files(calm, 8)[name], f"stage {stage}, {name}"


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_and_as_if_it_had_been_left_out(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "skipping", 2, tmp_path)


@pytest.mark.slow
def test_a_pixel_that_is_no_number_costs_a_run_on_videos_that_one_step(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    for left_out in (False, True):
        run_ranks(__file__, "on_videos", 2, synthetic_shards, tmp_path / str(left_out), left_out)
    hurt, whole = (files(tmp_path / str(left_out), 6) for left_out in (False, True))
    for name in LEARNT:
        assert hurt[f"{name}.safetensors"] == whole[f"{name}.safetensors"], name
    culprit = (tmp_path / "False" / "culprit").read_text()
    for log in ("log.jsonl", "log-00001.jsonl"):
        events = [json.loads(line) for line in (tmp_path / "False" / log).read_text().splitlines()]
        (skipped,) = [event for event in events if event["event"] == "StepSkipped"]
        assert (skipped["step"], skipped["in_a_row"]) == (POISONED_STEP + 1, 1)
        assert skipped["samples"] == [culprit]
    lines = [json.loads(line) for line in (tmp_path / "False" / "metrics.jsonl").read_text().splitlines()]
    assert [line["taken"] for line in lines] == [True, True, True, False, True, True]


@pytest.mark.slow
def test_a_run_stops_after_too_many_such_steps_in_a_row(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "stopping", 2, tmp_path)


@pytest.mark.slow
def test_after_a_leap_of_the_loss_the_last_checkpoint_goes_on_with_the_videos_that_follow(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "going_back", 2, tmp_path)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

"""Training on two gloo ranks through DeepSpeed, on batches made of noise."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from mcl_dist.batch import TubeletBatch
from mcl_dist.checkpoint import Checkpoints, read_snapshot
from mcl_dist.encoder import EncoderConfig
from mcl_dist.engine import Engine, OptimizerConfig, join_process_group, pick_device
from mcl_dist.heads import HeadsConfig, Network
from mcl_dist.learner import Learner
from mcl_dist.listeners import MetricsFile, Started
from mcl_dist.momentum import MomentumEncoder
from mcl_dist.negatives import Queue
from mcl_dist.objective import Objective, ObjectiveConfig
from mcl_dist.ranks import Ranks
from mcl_dist.schedule import Schedule
from mcl_dist.trainer import Trainer

GLOBAL_BATCH, STEPS = 4, 6
LOSSES = ObjectiveConfig(queue=30, order="ramp")


def noise(ranks: Ranks, start: int) -> Iterator[TubeletBatch]:
    """The global batch of a step depends on the step alone."""
    for step in itertools.count(start):
        draw = torch.Generator().manual_seed(step)
        views = torch.randint(0, 256, (GLOBAL_BATCH, 4, 8, 32, 32, 3), generator=draw, dtype=torch.uint8)
        motion = torch.rand(GLOBAL_BATCH, 2, 4, 4, generator=draw)
        order = torch.randint(0, 2, (GLOBAL_BATCH,), generator=draw)
        size = GLOBAL_BATCH // ranks.count
        own = slice(ranks.rank * size, (ranks.rank + 1) * size)
        yield TubeletBatch(views[own], motion[own], order[own], torch.arange(GLOBAL_BATCH)[own])


def train(folder: str, optimizer: str, zero_stage: str, until: str) -> None:
    device = pick_device()
    join_process_group(device)
    ranks = Ranks(device)
    torch.manual_seed(0)
    network = Network(EncoderConfig(width=4, blocks=(1, 1)), HeadsConfig(dim=8)).train()
    momentum = MomentumEncoder(network, ranks, seed=0, autocast=False)
    learner = Learner(network, momentum, Queue.random(LOSSES.queue, 8, torch.Generator().manual_seed(0), device))
    checkpoints = Checkpoints(f"{folder}/checkpoints", ranks, keep=9)
    start, _ = checkpoints.latest()
    snapshot = checkpoints.load(start) if start else None
    if snapshot:
        learner.restore(snapshot, folder)
    config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=int(zero_stage))
    engine = Engine(Objective(network, temperature=0.1), config, batch_per_rank=GLOBAL_BATCH // ranks.count)
    if snapshot:
        engine.load_optimizer_state(snapshot.optimizer, snapshot.step)
    trainer = Trainer(
        engine=engine,
        learner=learner,
        ranks=ranks,
        schedule=Schedule(0.01, steps_per_epoch=2, total_steps=STEPS, warmup_epochs=1.0),
        losses=LOSSES,
        checkpoints=checkpoints,
        checkpoint_every=3,
        config={},
        batches=itertools.islice(noise(ranks, start or 0), int(until) - (start or 0)),
        listeners=[],
        start=start or 0,
    )
    if ranks.is_first:
        metrics = MetricsFile(Path(folder) / "metrics.jsonl")
        metrics(Started(start or 0, STEPS, None))
        trainer.listeners = [metrics]
    try:
        trainer.fit()
    except StopIteration:
        assert int(until) < STEPS


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "zero_stage"), [("sgd", 0), ("sgd", 1), ("adamw", 1), ("sgd", 2)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    run_ranks: Callable[..., None], tmp_path: Path, optimizer: str, zero_stage: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_ranks(__file__, "train", 2, whole, optimizer, zero_stage, STEPS)
    run_ranks(__file__, "train", 2, broken, optimizer, zero_stage, 5)  # stops two steps after its checkpoint
    run_ranks(__file__, "train", 2, broken, optimizer, zero_stage, STEPS)
    assert losses_of(whole) == losses_of(broken)
    last = f"checkpoints/step-{STEPS:09d}"
    assert {file.name: file.read_bytes() for file in (whole / last).iterdir()} == {
        file.name: file.read_bytes() for file in (broken / last).iterdir()
    }


@pytest.mark.slow
def test_the_zero_stages_take_the_same_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    for stage in (0, 1, 2):
        (tmp_path / str(stage)).mkdir()
        run_ranks(__file__, "train", 2, tmp_path / str(stage), "sgd", stage, STEPS)
    replicated, *sharded = (read_snapshot(f"{tmp_path}/{stage}/checkpoints/step-{STEPS:09d}") for stage in (0, 1, 2))
    for snapshot in sharded:
        for name, tensor in replicated.network.items():
            torch.testing.assert_close(snapshot.network[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(snapshot.queue, replicated.queue, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train", 2, tmp_path, "sgd", 1, 3)
    run_ranks(__file__, "train", 1, tmp_path, "sgd", 1, STEPS)
    assert len(losses_of(tmp_path)) == STEPS


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

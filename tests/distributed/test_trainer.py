"""Training on gloo ranks through DeepSpeed, on batches made of noise."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import distributed

from mcl_dist.checkpoint import read_snapshot
from mcl_dist.engine import OptimizerConfig
from mcl_dist.listeners import MetricsFile, Started
from tests.distributed.runs import STEPS, joined, noise, put_together


def train(folder: str, optimizer: str, zero_stage: str, until: str) -> None:
    ranks = joined()
    config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=int(zero_stage))
    trainer = put_together(
        folder, ranks, config, lambda start: itertools.islice(noise(ranks, start), int(until) - start)
    )
    if ranks.is_first:
        metrics = MetricsFile(Path(folder) / "metrics.jsonl")
        metrics(Started(trainer.start, STEPS, None))
        trainer.listeners = [metrics]
    try:
        trainer.fit()
    except StopIteration:
        assert int(until) < STEPS


def train_at_every_stage(folder: str) -> None:
    ranks = joined()
    for stage in range(4):
        config = OptimizerConfig(learning_rate=0.01, zero_stage=stage)
        put_together(f"{folder}/{stage}", ranks, config, lambda start: noise(ranks, start), steps=10).fit()


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "zero_stage"), [("lars", 0), ("adamw", 1), ("sgd", 2), ("adamw", 3)])
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
def test_the_zero_stages_take_the_same_ten_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_at_every_stage", 2, tmp_path)
    replicated, *sharded = (read_snapshot(f"{tmp_path}/{stage}/checkpoints/step-{10:09d}") for stage in range(4))
    for snapshot in sharded:
        for side in ("network", "momentum"):
            for name, tensor in getattr(replicated, side).items():
                difference = (getattr(snapshot, side)[name] - tensor).norm()
                assert difference <= 1e-5 * tensor.norm(), f"{side} {name}"
        assert (snapshot.queue - replicated.queue).norm() <= 1e-5 * replicated.queue.norm()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train", 2, tmp_path, "sgd", 1, 3)
    run_ranks(__file__, "train", 1, tmp_path, "sgd", 1, STEPS)
    assert len(losses_of(tmp_path)) == STEPS


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

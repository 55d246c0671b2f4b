"""Training on gloo ranks through DeepSpeed, on batches of noise."""

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
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.events import Started
from mcl_dist.run_log.listeners import MetricsFile
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from tests.support.gloo_runs import STEPS, build_trainer, join_ranks, noise


def train(group: ProcessGroup, folder: Path, optimizer: OptimizerConfig, until: int) -> None:
    """Resume from the last checkpoint; the run ends without a checkpoint when the batches end, after `until` steps."""
    trainer = build_trainer(
        folder, group, optimizer, lambda start: itertools.islice(noise(group, start), until - start)
    )
    if group.is_first:
        metrics = MetricsFile(folder / "metrics.jsonl")
        metrics(Started(trainer.start, STEPS, None))
        trainer.listeners = [metrics]
    try:
        trainer.fit()
    except StopIteration:
        assert until < STEPS


def train_with_and_without_interruption(folder: str, optimizer: str, zero_stage: str) -> None:
    group = join_ranks()
    config = OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=int(zero_stage))
    train(group, Path(folder, "uninterrupted"), config, STEPS)
    train(group, Path(folder, "interrupted"), config, 5)  # two steps after its checkpoint
    train(group, Path(folder, "interrupted"), config, STEPS)


def train_until(folder: str, until: str) -> None:
    train(join_ranks(), Path(folder), OptimizerConfig(learning_rate=0.01), int(until))


def train_at_every_stage(folder: str) -> None:
    group = join_ranks()
    for stage in range(4):
        config = OptimizerConfig(learning_rate=0.01, zero_stage=stage)
        build_trainer(f"{folder}/{stage}", group, config, lambda start: noise(group, start), steps=10).fit()


def train_then_resume_with_another_optimizer(folder: str) -> None:
    group = join_ranks()
    train(group, Path(folder), OptimizerConfig(learning_rate=0.01, momentum=0.0), 3)
    for other in (OptimizerConfig(), OptimizerConfig(name="adamw")):
        with pytest.raises(
            UserError, match=r"checkpoint of step 3 has no \w+/encoder\S+: set optimizer\.name and optimizer\.momentum"
        ):
            train(group, Path(folder), other, STEPS)


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "zero_stage"), [("lars", 0), ("adamw", 1), ("sgd", 2), ("adamw", 3)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    run_ranks: Callable[..., None], tmp_path: Path, optimizer: str, zero_stage: int
) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    uninterrupted.mkdir()
    interrupted.mkdir()
    run_ranks(__file__, "train_with_and_without_interruption", 2, tmp_path, optimizer, zero_stage)
    assert losses_of(uninterrupted) == losses_of(interrupted)
    last = f"checkpoints/step-{STEPS:09d}"
    assert {file.name: file.read_bytes() for file in (uninterrupted / last).iterdir()} == {
        file.name: file.read_bytes() for file in (interrupted / last).iterdir()
    }


@pytest.mark.slow
def test_all_zero_stages_give_the_same_ten_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_at_every_stage", 2, tmp_path)
    replicated, *sharded = (read_snapshot(f"{tmp_path}/{stage}/checkpoints/step-{10:09d}") for stage in range(4))
    for snapshot in sharded:
        for side in ("network", "momentum"):
            for name, tensor in getattr(replicated, side).items():
                difference = (getattr(snapshot, side)[name] - tensor).norm()
                assert difference <= 1e-5 * tensor.norm(), f"{side} {name}"
        assert (snapshot.queue - replicated.queue).norm() <= 1e-5 * replicated.queue.norm()


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_until", 2, tmp_path, 3)
    run_ranks(__file__, "train_until", 1, tmp_path, STEPS)
    assert len(losses_of(tmp_path)) == STEPS


@pytest.mark.slow
def test_resuming_with_another_optimizer_is_rejected(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_then_resume_with_another_optimizer", 1, tmp_path)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo's teardown sometimes aborts

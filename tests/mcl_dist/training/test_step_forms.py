"""Steps with gradient accumulation and with compiled encoders, on gloo ranks through DeepSpeed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed

from mcl_dist.batch import TubeletBatch
from mcl_dist.checkpoint import read_snapshot
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from tests.support.gloo_runs import GLOBAL_BATCH, IGNORE_SPIKES, build_trainer, join_ranks, noise

SGD = OptimizerConfig(learning_rate=0.01)


def repeated_halves(group: ProcessGroup, start: int) -> Iterator[TubeletBatch]:
    """Batches with two equal halves on every rank, so that BatchNorm's statistics of a half are those of both."""
    for batch in noise(group, start):
        half = torch.arange(len(batch.order) // 2).repeat(2)
        yield TubeletBatch(**{name: tensor[half] for name, tensor in vars(batch).items()})


def parameters(folder: Path, step: int) -> torch.Tensor:
    network = read_snapshot(f"{folder}/checkpoints/step-{step:09d}").network
    return torch.cat([network[name].flatten() for name in sorted(network)])


def train_in_parts(folder: str) -> None:
    """Train at every ZeRO stage, with a rank's videos of a step in one part and in two."""
    group = join_ranks()
    for stage in range(4):
        for parts in (1, 2):
            build_trainer(
                f"{folder}/{stage}-{parts}",
                group,
                replace(SGD, zero_stage=stage),
                lambda start: repeated_halves(group, start),
                config=replace(IGNORE_SPIKES, accumulate=parts, global_batch=GLOBAL_BATCH),
                steps=3,
            ).fit()


def train_compiled(folder: str) -> None:
    group = join_ranks()
    for is_compiled in (False, True):
        trainer = build_trainer(
            f"{folder}/{is_compiled}", group, replace(SGD, zero_stage=1), lambda start: noise(group, start), steps=3
        )
        if is_compiled:
            trainer.state.compile()
        trainer.fit()


@pytest.mark.slow
def test_a_step_in_parts_equals_a_step_in_one_part(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_in_parts", 2, tmp_path)
    whole = parameters(tmp_path / "0-1", 3)
    for stage in range(4):
        for parts in (1, 2):
            difference = (parameters(tmp_path / f"{stage}-{parts}", 3) - whole).norm()
            assert difference <= 1e-5 * whole.norm(), f"stage {stage}, {parts} parts"


@pytest.mark.slow
def test_compiled_encoders_give_the_same_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train_compiled", 1, tmp_path)
    eager, compiled = (parameters(tmp_path / str(is_compiled), 3) for is_compiled in (False, True))
    assert (eager - compiled).norm() <= 1e-4 * eager.norm()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo's teardown sometimes aborts

"""One step by other ways: in parts, compiled; on gloo ranks through DeepSpeed."""

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
from tests.support.gloo_runs import GLOBAL_BATCH, QUIET, joined, noise, put_together

SGD = OptimizerConfig(learning_rate=0.01)


def twins(group: ProcessGroup, start: int) -> Iterator[TubeletBatch]:
    """Batches whose halves on a rank are alike, so that BatchNorm finds in either what it finds in both."""
    for batch in noise(group, start):
        half = torch.arange(len(batch.order) // 2).repeat(2)
        yield TubeletBatch(**{name: tensor[half] for name, tensor in vars(batch).items()})


def parameters(folder: Path, step: int) -> torch.Tensor:
    network = read_snapshot(f"{folder}/checkpoints/step-{step:09d}").network
    return torch.cat([network[name].flatten() for name in sorted(network)])


def in_parts(folder: str) -> None:
    """At every ZeRO stage, with every step's share of a rank taken in one part, and in two."""
    group = joined()
    for stage in range(4):
        for parts in (1, 2):
            put_together(
                f"{folder}/{stage}-{parts}",
                group,
                replace(SGD, zero_stage=stage),
                lambda start: twins(group, start),
                settings=replace(QUIET, accumulate=parts, global_batch=GLOBAL_BATCH),
                steps=3,
            ).fit()


def compiled(folder: str) -> None:
    group = joined()
    for compiles in (False, True):
        trainer = put_together(
            f"{folder}/{compiles}", group, replace(SGD, zero_stage=1), lambda start: noise(group, start), steps=3
        )
        if compiles:
            trainer.learner.compile()
        trainer.fit()


@pytest.mark.slow
def test_a_step_in_parts_is_that_of_the_whole(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "in_parts", 2, tmp_path)
    whole = parameters(tmp_path / "0-1", 3)
    for stage in range(4):
        for parts in (1, 2):
            difference = (parameters(tmp_path / f"{stage}-{parts}", 3) - whole).norm()
            assert difference <= 1e-5 * whole.norm(), f"stage {stage}, {parts} parts"


@pytest.mark.slow
def test_compiled_encoders_take_the_same_steps(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "compiled", 1, tmp_path)
    eager, fast = (parameters(tmp_path / str(compiles), 3) for compiles in (False, True))
    assert (eager - fast).norm() <= 1e-4 * eager.norm()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

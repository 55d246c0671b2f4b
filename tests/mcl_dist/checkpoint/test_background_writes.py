"""Checkpoints copied as late as possible equal those copied before the next step begins."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mcl_dist.batch import TubeletBatch
from mcl_dist.checkpoint.format import NETWORK, rank_file
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from mcl_dist.training.trainer import Trainer
from tests.support.gloo_runs import STEPS, build_trainer, join_ranks, noise

EVERY = 3  # as in `build_trainer`: one checkpoint in the middle, one at the end
SECONDS = 60.0
CONTROL = 2  # the ZeRO stage that also runs a trainer that does not wait
CASES = (("sgd", 0, 1, False), ("adamw", 1, 2, True), ("sgd", 2, 1, False), ("adamw", 3, 1, False))


def batches(group: ProcessGroup, start: int, poisoned: bool) -> Iterator[TubeletBatch]:
    """Noise; if `poisoned`, the step after the checkpoint is not finite."""
    for step, batch in enumerate(noise(group, start), start):
        views = batch.views.float()
        if poisoned and step == EVERY:
            views[0, 0, 1, 2, 3, 0] = torch.nan
        yield replace(batch, views=views)


def copied_at_once(trainer: Trainer) -> None:
    """Complete each checkpoint before the next step begins."""
    begin = trainer.checkpoints.begin_save

    def beginning(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        trainer.checkpoints.join()

    trainer.checkpoints.begin_save = beginning  # type: ignore[method-assign]


def copied_late(trainer: Trainer) -> None:
    """Delay every copy until training waits for it or, if it does not wait, has changed the tensors."""
    is_time = threading.Event()
    checkpoints, engine = trainer.checkpoints, trainer.engine
    begin, copy, wait_for_copy = checkpoints.begin_save, checkpoints.staging.copy_deferred, checkpoints.wait_for_copy
    join, step = checkpoints.join, engine.step

    def beginning(*arguments: Any, **options: Any) -> None:
        is_time.clear()
        begin(*arguments, **options)

    def copying() -> None:
        assert is_time.wait(SECONDS)
        copy()

    def waiting() -> None:
        is_time.set()
        wait_for_copy()

    def joining(*seconds: float) -> None:
        if checkpoints.is_writing:  # `begin_save` joins too, when nothing is being written
            is_time.set()
        join(*seconds)

    def stepping(*arguments: Any) -> Any:
        update = step(*arguments)
        is_time.set()
        return update

    checkpoints.begin_save = beginning  # type: ignore[method-assign]
    checkpoints.staging.copy_deferred = copying  # type: ignore[method-assign]
    checkpoints.wait_for_copy = waiting  # type: ignore[method-assign]
    checkpoints.join = joining  # type: ignore[method-assign]
    engine.step = stepping  # type: ignore[method-assign]


def copied_too_late(trainer: Trainer) -> None:
    """Copy late for a trainer that does not wait."""
    copied_late(trainer)
    trainer.checkpoints.wait_for_copy = lambda: None  # type: ignore[method-assign]


def train(folder: str) -> None:
    group = join_ranks()
    for optimizer, stage, accumulate, poisoned in CASES:
        for arrange in (copied_at_once, copied_late, copied_too_late):
            if arrange is copied_too_late and stage != CONTROL:
                continue
            trainer = build_trainer(
                Path(folder, f"{stage}-{arrange.__name__}"),
                group,
                OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=stage),
                lambda start, poisoned=poisoned: batches(group, start, poisoned),
                config=TrainConfig(on_spike="ignore", accumulate=accumulate),
            )
            arrange(trainer)
            trainer.fit()


def files(run: Path, step: int) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / f"checkpoints/step-{step:09d}").iterdir()}


@pytest.mark.slow
def test_a_checkpoint_copied_during_the_next_step_is_exact(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    run_ranks(__file__, "train", 2, tmp_path)
    for _, stage, *_ in CASES:
        at_once, late = tmp_path / f"{stage}-copied_at_once", tmp_path / f"{stage}-copied_late"
        for step in (EVERY, STEPS):
            assert files(at_once, step) == files(late, step), f"stage {stage}, step {step}"
    right, wrong = (files(tmp_path / f"{CONTROL}-{name}", EVERY) for name in ("copied_late", "copied_too_late"))
    for name in (NETWORK, rank_file("optimizer", 0), rank_file("optimizer", 1)):
        assert right[name] != wrong[name], f"{name}: this test would not detect a trainer that does not wait"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo sometimes aborts at shutdown

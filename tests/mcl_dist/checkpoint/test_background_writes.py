"""Checkpoints copied as late as may be, behind a whole step, and those copied before the next step begins."""

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
from mcl_dist.checkpoint.format import NETWORK, optimizer_file
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from mcl_dist.training.trainer import TrainConfig, Trainer
from tests.support.gloo_runs import STEPS, joined, noise, put_together

EVERY = 3  # as `put_together` has it: one checkpoint in the middle, one at the end
SECONDS = 60.0
CONTROL = 2  # the stage at which a trainer is tried that does not wait
CASES = (("sgd", 0, 1, False), ("adamw", 1, 2, True), ("sgd", 2, 1, False), ("adamw", 3, 1, False))


def batches(group: ProcessGroup, start: int, poisoned: bool) -> Iterator[TubeletBatch]:
    """Noise; where asked for, the step behind which a checkpoint is copied is none that counts."""
    for step, batch in enumerate(noise(group, start), start):
        views = batch.views.float()
        if poisoned and step == EVERY:
            views[0, 0, 1, 2, 3, 0] = torch.nan
        yield replace(batch, views=views)


def copied_at_once(trainer: Trainer) -> None:
    """Let no step begin before a checkpoint is complete."""
    begin = trainer.checkpoints.begin

    def beginning(*arguments: Any, **more: Any) -> None:
        begin(*arguments, **more)
        trainer.checkpoints.join()

    trainer.checkpoints.begin = beginning  # type: ignore[method-assign]


def copied_late(trainer: Trainer) -> None:
    """Hold every copy back until training waits for it or, did it not, has changed what is to be copied."""
    is_time = threading.Event()
    checkpoints, engine = trainer.checkpoints, trainer.engine
    begin, fill, await_copy = checkpoints.begin, checkpoints._copy.fill, checkpoints.await_copy
    join, step = checkpoints.join, engine.step

    def beginning(*arguments: Any, **more: Any) -> None:
        is_time.clear()
        begin(*arguments, **more)

    def filling() -> None:
        assert is_time.wait(SECONDS)
        fill()

    def waiting() -> None:
        is_time.set()
        await_copy()

    def joining(*seconds: float) -> None:
        if checkpoints.is_writing:  # `begin` asks too, when nothing is
            is_time.set()
        join(*seconds)

    def stepping(*arguments: Any) -> Any:
        update = step(*arguments)
        is_time.set()
        return update

    checkpoints.begin = beginning  # type: ignore[method-assign]
    checkpoints._copy.fill = filling  # type: ignore[method-assign]
    checkpoints.await_copy = waiting  # type: ignore[method-assign]
    checkpoints.join = joining  # type: ignore[method-assign]
    engine.step = stepping  # type: ignore[method-assign]


def copied_too_late(trainer: Trainer) -> None:
    """As if training did not wait."""
    copied_late(trainer)
    trainer.checkpoints.await_copy = lambda: None  # type: ignore[method-assign]


def train(folder: str) -> None:
    group = joined()
    for optimizer, stage, accumulate, poisoned in CASES:
        for arrange in (copied_at_once, copied_late, copied_too_late):
            if arrange is copied_too_late and stage != CONTROL:
                continue
            trainer = put_together(
                Path(folder, f"{stage}-{arrange.__name__}"),
                group,
                OptimizerConfig(name=optimizer, learning_rate=0.01, zero_stage=stage),
                lambda start, poisoned=poisoned: batches(group, start, poisoned),
                settings=TrainConfig(on_spike="ignore", accumulate=accumulate),
            )
            arrange(trainer)
            trainer.fit()


def files(run: Path, step: int) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / f"checkpoints/step-{step:09d}").iterdir()}


@pytest.mark.slow
def test_a_checkpoint_copied_behind_a_step_is_that_of_the_step_before_to_the_bit(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, "train", 2, tmp_path)
    for _, stage, *_ in CASES:
        at_once, late = tmp_path / f"{stage}-copied_at_once", tmp_path / f"{stage}-copied_late"
        for step in (EVERY, STEPS):
            assert files(at_once, step) == files(late, step), f"stage {stage}, step {step}"
    right, wrong = (files(tmp_path / f"{CONTROL}-{name}", EVERY) for name in ("copied_late", "copied_too_late"))
    for name in (NETWORK, optimizer_file(0), optimizer_file(1)):
        assert right[name] != wrong[name], f"{name}: a trainer that does not wait would not be found out"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

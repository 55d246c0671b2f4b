"""Pre-training on videos, composed as by `mcl pretrain`: resumed at any step, and with other numbers of ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from launch.pretraining.compose import compose_trainer
from launch.run.config import PretrainConfig
from launch.run.parts import RankContext
from mcl_dist.batch import TubeletBatch
from mcl_dist.config import load_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.training.deepspeed_engine import join_process_group, pick_device
from tests.support.paths import REPOSITORY

SMALL = ("data.crop=48", "encoder.width=4", "heads.dim=8", "objective.queue=64", "train.global_batch=4")
STEPS = 12
RESUMES = 10


def train(group: ProcessGroup, shards: str, folder: Path, until: int, *more: str) -> None:
    """Train to a step in the folder, and log the samples of each step in order."""
    run = (f"data.train={shards}", f"run.dir={folder}", f"train.steps={STEPS}", "checkpoint.keep=99")
    config = load_config(PretrainConfig, REPOSITORY / "configs" / "pretrain" / "tiny.yaml", [*run, *SMALL, *more])
    with compose_trainer(config, RankContext(group, StopRequest(), Heartbeat(), StartInfo(0.0))) as trainer:
        batches = trainer.batches

        def logged_batches() -> Iterator[TubeletBatch]:
            for step in range(trainer.start, until):
                batch = next(batches)
                samples = group.gather(batch.samples).tolist()
                if group.is_first:
                    with (folder / "samples.jsonl").open("a") as file:
                        file.write(json.dumps({"step": step + 1, "samples": samples}) + "\n")
                yield batch

        trainer.batches = logged_batches()
        try:
            trainer.fit()
        except StopIteration:
            assert until < STEPS
    group.barrier()


def resume_at_random_steps(shards: str, folder: str) -> None:
    device = pick_device()
    join_process_group(device)
    group = ProcessGroup(device)
    whole = Path(folder, "whole")
    more = ("checkpoint.every=1", "train.on_spike=warn", "train.spike_window=4")
    train(group, shards, whole, STEPS, *more)
    for step in sorted(random.Random(6).sample(range(1, STEPS), RESUMES)):
        resumed = Path(folder, f"from-{step}")
        if group.is_first:
            shutil.copytree(whole / f"checkpoints/step-{step:09d}", resumed / f"checkpoints/step-{step:09d}")
        group.barrier()
        torch.manual_seed(step)  # the state of the process must not matter
        train(group, shards, resumed, STEPS, *more)


def resume(shards: str, folder: str, until: str) -> None:
    device = pick_device()
    join_process_group(device)
    more = ("checkpoint.every=1", "encoder.batch_norm=synchronized")
    train(ProcessGroup(device), shards, Path(folder), int(until), *more)


def lines(path: Path) -> dict[int, dict[str, object]]:
    return {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}


def losses(run: Path) -> dict[int, float]:
    return {step: float(str(line["loss"])) for step, line in lines(run / "metrics.jsonl").items()}


def content(run: Path) -> dict[str, bytes]:
    """The last checkpoint without its configuration, which names the run folder."""
    files = {path.name: path.read_bytes() for path in (run / f"checkpoints/step-{STEPS:09d}").iterdir()}
    state = json.loads(files.pop("state.json"))
    del state["config"], files["COMMITTED"]
    return files | {"state": json.dumps(state).encode()}


@pytest.mark.slow
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one_to_the_bit(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    run_ranks(__file__, "resume_at_random_steps", 2, synthetic_shards, tmp_path)
    whole, resumed = tmp_path / "whole", sorted(tmp_path.glob("from-*"))
    assert len(resumed) == RESUMES
    for run in resumed:
        later = range(int(run.name.removeprefix("from-")) + 1, STEPS + 1)
        for name in ("samples", "losses"):
            every, some = (losses(at) if name == "losses" else lines(at / "samples.jsonl") for at in (whole, run))
            assert {step: every[step] for step in later} == some, f"{run.name}: {name}"
        assert content(run) == content(whole), run.name


@pytest.mark.slow
def test_a_run_on_two_then_four_then_one_ranks_has_the_samples_and_losses_of_a_run_on_two(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    whole, resized = tmp_path / "whole", tmp_path / "resized"
    run_ranks(__file__, "resume", 2, synthetic_shards, whole, STEPS)
    for num_ranks, until in ((2, 4), (4, 8), (1, STEPS)):
        run_ranks(__file__, "resume", num_ranks, synthetic_shards, resized, until)
    assert lines(resized / "samples.jsonl") == lines(whole / "samples.jsonl")
    expected, found = losses(whole), losses(resized)
    assert expected.keys() == found.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) <= 1e-4, f"step {step}"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # shutting gloo down aborts sometimes

"""Runs with and without online evaluations, composed as by `mcl pretrain`."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from launch.evaluation import online_knn
from launch.evaluation.online_knn import OnlineKnn
from mcl_dist.checkpoint import load_encoder
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.evaluation.feature_cache import module_digest
from mcl_dist.model.encoder import Encoder
from mcl_dist.training.deepspeed_engine import join_process_group, pick_device
from tests.launch.pretraining.test_exact_resume import lines, losses, train

STEPS = 3
EVALUATED = (2, 3)
RUNS = ("without", "with")


class LoggedKnn(OnlineKnn):
    """Logs the digests of the encoders that it scores."""

    file = Path()

    def __call__(self, encoder: Encoder, step: int) -> dict[str, float] | None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "digest": module_digest(encoder)}) + "\n")
        return super().__call__(encoder, step)


def training(shards: str, folder: str, zero_stage: str) -> None:
    """Train without, then with evaluations."""
    device = pick_device()
    join_process_group(device)
    group = ProcessGroup(device)
    online_knn.OnlineKnn = LoggedKnn  # type: ignore[misc]
    LoggedKnn.file = Path(folder, f"digests-{group.rank}.jsonl")
    for name in RUNS:
        more = [f"train.steps={STEPS}", "checkpoint.every=1", f"optimizer.zero_stage={zero_stage}"]
        if name == "with":
            more += ["evaluate.every=2", f"evaluate.test={shards}", "evaluate.clips=1", "evaluate.videos=5"]
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002  (the generator that libraries use)
        train(group, shards, Path(folder, name), STEPS, *more)
        states = (torch.get_rng_state().tolist(), random.getstate()[1], np.random.get_state()[1].tolist())  # noqa: NPY002
        Path(folder, name, f"generators-{group.rank}.json").write_text(json.dumps(states))


def contents(run: Path) -> dict[str, bytes]:
    """Files of all checkpoints, without those that hold the configuration."""
    files = (file for file in run.rglob("step-*/*") if file.name not in ("state.json", "COMMITTED"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 1), (2, 3)])
def test_online_evaluations_leave_a_run_equal_to_the_bit_and_score_the_encoders_of_its_checkpoints(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path, num_ranks: int, zero_stage: int
) -> None:
    run_ranks(__file__, "training", num_ranks, synthetic_shards, tmp_path, zero_stage)
    without, evaluated = (tmp_path / name for name in RUNS)
    assert lines(evaluated / "samples.jsonl") == lines(without / "samples.jsonl")
    assert losses(evaluated) == losses(without)
    assert contents(evaluated) == contents(without)
    digests = {step: module_digest(load_encoder(f"{without}/checkpoints/step-{step:09d}")[0]) for step in EVALUATED}
    for rank in range(num_ranks):
        name = f"generators-{rank}.json"
        assert (evaluated / name).read_text() == (without / name).read_text()
        scored = lines(tmp_path / f"digests-{rank}.jsonl")
        assert {step: line["digest"] for step, line in scored.items()} == digests
    events = [json.loads(line) for line in (evaluated / "log.jsonl").read_text().splitlines()]
    found = {event["step"]: event for event in events if event["event"] == "Evaluated"}
    assert tuple(found) == EVALUATED
    for event in found.values():
        assert event["scores"] == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0}  # a video's nearest is itself
    accounts = [event for event in events if event["event"] == "Accounts"][-1]
    assert accounts["lost_seconds"]["evaluation"] == pytest.approx(sum(event["seconds"] for event in found.values()))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # shutting gloo down aborts sometimes

"""Training protocols on gloo ranks through DeepSpeed, with a real set and a small encoder."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from dataloading.reading.shard_set import ShardSet
from dataloading.shards.format import MANIFEST, parse_manifest
from launch.evaluation.config import FinetuneEvaluation, LinearEvaluation, LinearTraining, TrainingEvaluation
from launch.evaluation.encoder_under_test import RANDOM, EncoderUnderTest, load_encoder_under_test
from launch.evaluation.trainee import Task, build_trainee
from launch.evaluation.training_protocols import (
    ClassifierResult,
    checkpoint_config,
    compose_classifier_trainer,
    train_and_test,
)
from launch.run.config import PretrainConfig
from launch.run.parts import RankContext
from mcl_dist.batch import LabelledBatch
from mcl_dist.checkpoint import read_snapshot
from mcl_dist.config import build_config, load_config
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

PRETRAINED = {
    "data": {"train": "unused", "frames": 8, "stride": 4, "crop": 32},
    "encoder": {"width": 4, "blocks": [1, 1]},
    "heads": {"dim": 8},
}
SMALL = ("clips.frames=8", "clips.count=3", "train.global_batch=6", "data.threads=1", "checkpoint.keep=99")
STEPS = 8
ALONE = RankContext(ProcessGroup(), StopRequest(), Heartbeat(), StartInfo(0.0))


def untrained_encoder(seed: int = 5) -> EncoderUnderTest:
    return load_encoder_under_test(
        RANDOM, build_config(PretrainConfig, {**PRETRAINED, "run": {"dir": "unused", "seed": seed}})
    )


def evaluation_config(schema: type[TrainingEvaluation], folder: Path, *more: str) -> TrainingEvaluation:
    return load_config(schema, None, [f"run.dir={folder}", f"train.steps={STEPS}", *SMALL, *more])


def join_ranks() -> RankContext:
    device = pick_device()
    torch.set_num_threads(1)
    join_process_group(device)
    return RankContext(ProcessGroup(device), StopRequest(), Heartbeat(), StartInfo(0.0))


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(run: Path) -> Path:
    return run / f"checkpoints/step-{STEPS:09d}"


def train_linear(shards: str, folder: Path, rank: RankContext) -> None:
    result = train_and_test(untrained_encoder(), shards, shards, evaluation_config(LinearEvaluation, folder), rank)
    if result.scores:
        (folder / "scores.json").write_text(json.dumps(result.scores.to_json()))


class StopsAt(Heartbeat):
    """Requests a stop when a step starts."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__()
        self._step, self._stop = step, stop

    def start_step(self, step: int) -> None:
        super().start_step(step)
        if step == self._step:
            self._stop.request("a test")


def finetune(shards: str, folder: Path, rank: RankContext, *more: str) -> ClassifierResult:
    config = evaluation_config(FinetuneEvaluation, folder, "checkpoint.every=3", *more)
    result = train_and_test(untrained_encoder(), shards, shards, config, rank)
    if result.scores:
        (folder / "scores.json").write_text(json.dumps(result.scores.to_json()))
    return result


def run_one_rank(shards: str, folder: str) -> None:
    rank = join_ranks()
    compare_linear_with_torch(shards, Path(folder, "torch"), rank)
    train_linear(shards, Path(folder, "linear"), rank)
    assert finetune(shards, Path(folder, "finetuned"), rank, "finetune.batch_norm=synchronized").is_done


def run_two_ranks(shards: str, folder: str) -> None:
    """Fine-tune uninterrupted; with a stop request on one rank, then resumed; and with statistics of all ranks."""
    rank, stopped = join_ranks(), Path(folder, "stopped")
    assert finetune(shards, Path(folder, "whole"), rank).is_done
    stop = StopRequest()
    heartbeat = StopsAt(3, stop) if rank.group.is_first else Heartbeat()
    assert not finetune(shards, stopped, RankContext(rank.group, stop, heartbeat, rank.start_info)).is_done
    torch.manual_seed(3)  # the state of the process must not matter
    assert finetune(shards, stopped, rank).is_done
    assert finetune(shards, Path(folder, "finetuned"), rank, "finetune.batch_norm=synchronized").is_done


def run_three_ranks(shards: str, folder: str) -> None:
    train_linear(shards, Path(folder, "linear"), join_ranks())


def content(run: Path) -> dict[str, bytes]:
    """The last checkpoint without its configuration, which names the run folder."""
    files = {path.name: path.read_bytes() for path in last_checkpoint(run).iterdir()}
    state = json.loads(files.pop("state.json"))
    del state["config"], files["COMMITTED"]
    return files | {"state": json.dumps(state).encode()}


def compare_linear_with_torch(shards: str, folder: Path, rank: RankContext) -> None:
    """Train the layer, record its inputs, and train another layer on them with plain PyTorch."""
    config = evaluation_config(LinearEvaluation, folder)
    with closing(ShardSet(shards)) as train:
        task = Task(shards, train, train, untrained_encoder().clip_geometry(config.clips), config)
        run_config = checkpoint_config(untrained_encoder(), task)
        trainee = build_trainee(untrained_encoder(), task, rank.group)
        plain = build_trainee(untrained_encoder(), task, rank.group).network
        inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        with compose_classifier_trainer(trainee, task, run_config, rank) as trainer:
            batches = trainer.batches

            def recorded_batches() -> Iterator[LabelledBatch]:
                for batch in batches:
                    inputs.append((trainee.prepare(batch.views[:, 0]), batch.labels))
                    yield batch

            trainer.batches = recorded_batches()
            assert trainer.fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=16.0, momentum=0.9)
    for step, ((features, labels), line) in enumerate(zip(inputs[:STEPS], lines(folder), strict=True)):
        optimizer.param_groups[0]["lr"] = 1e-6 + (16.0 - 1e-6) * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = cross_entropy(plain.linear(features), labels)
        assert abs(float(loss.detach()) - line["loss"]) <= 1e-5 * abs(line["loss"]), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = read_snapshot(str(last_checkpoint(folder))).network
    for name, parameter in plain.named_parameters():
        assert (trained[name] - parameter).norm() <= 1e-5 * parameter.norm(), name


@pytest.fixture(scope="module")
def one(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank, which also asserts that a linear layer is trained as by plain PyTorch."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(__file__, "run_one_rank", 1, synthetic_shards, folder)
    return folder


@pytest.fixture(scope="module")
def two(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, "run_two_ranks", 2, synthetic_shards, folder)
    return folder


@pytest.fixture(scope="module")
def three(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    run_ranks(__file__, "run_three_ranks", 3, synthetic_shards, folder)
    return folder


def scores(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "scores.json").read_text())
    return found


@pytest.mark.slow
def test_the_linear_layer_is_trained_as_by_plain_torch_on_the_same_features(one: Path) -> None:
    assert len(lines(one / "torch")) == STEPS


@pytest.mark.slow
def test_three_ranks_score_like_one_although_they_do_not_divide_the_test_videos(one: Path, three: Path) -> None:
    alone, together = scores(one / "linear"), scores(three / "linear")
    assert alone == together
    assert sum(map(sum, alone["confusion"])) == 16
    ours, theirs = (read_snapshot(str(last_checkpoint(folder / "linear"))).network for folder in (one, three))
    for name, value in ours.items():
        assert (theirs[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
def test_fine_tuning_stopped_and_resumed_equals_the_uninterrupted_run_to_the_bit(two: Path) -> None:
    whole, stopped = two / "whole", two / "stopped"
    events = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    (stopping,) = (event for event in events if event["event"] == "Stopping")
    assert 3 < stopping["step"] < STEPS
    assert [event["step"] for event in events if event["event"] == "Started"] == [0, stopping["step"]]
    assert [line["loss"] for line in lines(stopped)] == [line["loss"] for line in lines(whole)]
    assert content(stopped) == content(whole)
    assert scores(stopped) == scores(whole)


@pytest.mark.slow
def test_fine_tuning_with_synchronized_batch_norm_does_not_depend_on_the_number_of_ranks(one: Path, two: Path) -> None:
    for ours, theirs in zip(lines(one / "finetuned"), lines(two / "finetuned"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert scores(one / "finetuned") == scores(two / "finetuned")


@pytest.mark.slow
def test_a_run_folder_of_another_run_is_refused(one: Path, synthetic_shards: Path) -> None:
    shards, config = str(synthetic_shards), evaluation_config(LinearEvaluation, one / "linear")
    with pytest.raises(UserError, match=r"made with made_of\.encoder=.*start another run in another run\.dir"):
        train_and_test(untrained_encoder(seed=6), shards, shards, config, ALONE)
    with pytest.raises(UserError, match=r"made with train\.global_batch=6, now 3"):
        train_and_test(
            untrained_encoder(), shards, shards, replace(config, train=LinearTraining(global_batch=3)), ALONE
        )


@pytest.mark.slow
def test_a_checkpoint_of_a_classifier_cannot_be_evaluated(one: Path) -> None:
    with pytest.raises(UserError, match="has no encoder and heads; name a checkpoint of pre-training"):
        load_encoder_under_test(str(one / "finetuned"))


def test_a_stride_that_the_sets_lack_is_reported_before_training(synthetic_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(synthetic_shards, tmp_path / "every-second"))
    manifest = parse_manifest((shards / MANIFEST).read_bytes(), MANIFEST)
    every_second = replace(manifest, build={**manifest.build, "keep_every": 2})
    (shards / MANIFEST).write_bytes(every_second.to_json())
    config = evaluation_config(LinearEvaluation, tmp_path / "run", "clips.stride=3")
    with pytest.raises(UserError, match=r"clips\.stride: found 3, must be a multiple of 2"):
        train_and_test(untrained_encoder(), str(shards), str(shards), config, ALONE)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_set_is_reported_before_training(synthetic_shards: Path, tmp_path: Path) -> None:
    config = evaluation_config(LinearEvaluation, tmp_path)
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: missing"):
        train_and_test(untrained_encoder(), str(synthetic_shards), str(tmp_path / "nowhere"), config, ALONE)
    assert not (tmp_path / "checkpoints").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # shutting gloo down aborts sometimes

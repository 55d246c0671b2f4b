"""Protocols that train, on gloo ranks through DeepSpeed, on a real set and an encoder of a few channels."""

from __future__ import annotations

import json
import math
import os
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
from launch.evaluation.config import FinetuneEvaluation, LinearEvaluation, LinearTraining, TrainingEvaluation
from launch.evaluation.encoder_under_test import RANDOM, EncoderUnderTest, load_subject
from launch.evaluation.training_protocols import (
    ClassifierResult,
    Rank,
    Task,
    assembled,
    described_by,
    evaluate_supervised,
    pupil_of,
)
from launch.run.config import PretrainConfig
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
ALONE = Rank(ProcessGroup(), StopRequest(), Heartbeat(), StartInfo(0.0))


def subject(seed: int = 5) -> EncoderUnderTest:
    return load_subject(RANDOM, build_config(PretrainConfig, {**PRETRAINED, "run": {"dir": "unused", "seed": seed}}))


def settings(schema: type[TrainingEvaluation], folder: Path, *more: str) -> TrainingEvaluation:
    return load_config(schema, None, [f"run.dir={folder}", f"train.steps={STEPS}", *SMALL, *more])


def joined() -> Rank:
    device = pick_device()
    torch.set_num_threads(1)
    join_process_group(device)
    return Rank(ProcessGroup(device), StopRequest(), Heartbeat(), StartInfo(0.0))


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> Path:
    return run / f"checkpoints/step-{STEPS:09d}"


def linear(shards: str, folder: Path, rank: Rank) -> None:
    outcome = evaluate_supervised(subject(), shards, shards, settings(LinearEvaluation, folder), rank)
    if outcome.scores:
        (folder / "scores.json").write_text(json.dumps(outcome.scores.to_json()))


class AskingAt(Heartbeat):
    """Asks to stop when a step begins."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__()
        self._step, self._stop = step, stop

    def begins_step(self, step: int) -> None:
        super().begins_step(step)
        if step == self._step:
            self._stop.ask("a test")


def finetuned(shards: str, folder: Path, rank: Rank, *more: str) -> ClassifierResult:
    config = settings(FinetuneEvaluation, folder, "checkpoint.every=3", *more)
    outcome = evaluate_supervised(subject(), shards, shards, config, rank)
    if outcome.scores:
        (folder / "scores.json").write_text(json.dumps(outcome.scores.to_json()))
    return outcome


def by_one(shards: str, folder: str) -> None:
    rank = joined()
    linear_beside_plain_torch(shards, Path(folder, "beside"), rank)
    linear(shards, Path(folder, "linear"), rank)
    assert finetuned(shards, Path(folder, "finetuned"), rank, "finetune.batch_norm=synchronized").is_done


def by_two(shards: str, folder: str) -> None:
    """Fine-tuning in one go; asked at one rank alone to stop, and again; and with statistics of all ranks."""
    rank, broken = joined(), Path(folder, "broken")
    assert finetuned(shards, Path(folder, "whole"), rank).is_done
    stop = StopRequest()
    asked = AskingAt(3, stop) if rank.group.is_first else Heartbeat()
    assert not finetuned(shards, broken, Rank(rank.group, stop, asked, rank.birth)).is_done
    torch.manual_seed(3)  # nothing of the process itself may matter
    assert finetuned(shards, broken, rank).is_done
    assert finetuned(shards, Path(folder, "finetuned"), rank, "finetune.batch_norm=synchronized").is_done


def by_three(shards: str, folder: str) -> None:
    linear(shards, Path(folder, "linear"), joined())


def content(run: Path) -> dict[str, bytes]:
    """The last checkpoint but for its configuration, which names the run's folder."""
    files = {path.name: path.read_bytes() for path in last(run).iterdir()}
    state = json.loads(files.pop("state.json"))
    del state["config"], files["COMMITTED"]
    return files | {"state": json.dumps(state).encode()}


def linear_beside_plain_torch(shards: str, folder: Path, rank: Rank) -> None:
    """Train the layer, note what it saw, and train another one on that by PyTorch alone."""
    config = settings(LinearEvaluation, folder)
    with closing(ShardSet(shards)) as train:
        lesson = Task(shards, train, train, subject().shown(config.clips), config)
        described = described_by(subject(), lesson)
        pupil = pupil_of(subject(), lesson, rank.group)
        plain = pupil_of(subject(), lesson, rank.group).network
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with assembled(pupil, lesson, described, rank) as trainer:
            batches = trainer.batches

            def noted() -> Iterator[LabelledBatch]:
                for batch in batches:
                    seen.append((pupil.prepare(batch.views[:, 0]), batch.labels))
                    yield batch

            trainer.batches = noted()
            assert trainer.fit()
    optimizer = torch.optim.SGD(plain.parameters(), lr=16.0, momentum=0.9)
    for step, ((features, labels), line) in enumerate(zip(seen[:STEPS], lines(folder), strict=True)):
        optimizer.param_groups[0]["lr"] = 1e-6 + (16.0 - 1e-6) * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = cross_entropy(plain.linear(features), labels)
        assert abs(float(loss.detach()) - line["loss"]) <= 1e-5 * abs(line["loss"]), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = read_snapshot(str(last(folder))).network
    for name, parameter in plain.named_parameters():
        assert (trained[name] - parameter).norm() <= 1e-5 * parameter.norm(), name


@pytest.fixture(scope="module")
def one(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank has learnt; that it learns a linear layer as plain PyTorch does is asserted on the way."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(__file__, "by_one", 1, synthetic_shards, folder)
    return folder


@pytest.fixture(scope="module")
def two(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(__file__, "by_two", 2, synthetic_shards, folder)
    return folder


@pytest.fixture(scope="module")
def three(run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    run_ranks(__file__, "by_three", 3, synthetic_shards, folder)
    return folder


def scores(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "scores.json").read_text())
    return found


@pytest.mark.slow
def test_the_linear_layer_learns_as_by_plain_torch_on_the_same_features(one: Path) -> None:
    assert len(lines(one / "beside")) == STEPS


@pytest.mark.slow
def test_ranks_score_as_one_though_they_do_not_divide_the_test_videos(one: Path, three: Path) -> None:
    alone, together = scores(one / "linear"), scores(three / "linear")
    assert alone == together
    assert sum(map(sum, alone["confusion"])) == 16
    ours, theirs = (read_snapshot(str(last(folder / "linear"))).network for folder in (one, three))
    for name, value in ours.items():
        assert (theirs[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
def test_fine_tuning_that_was_stopped_and_resumed_equals_the_uninterrupted_to_the_bit(two: Path) -> None:
    whole, broken = two / "whole", two / "broken"
    events = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    (stopping,) = (event for event in events if event["event"] == "Stopping")
    assert 3 < stopping["step"] < STEPS
    assert [event["step"] for event in events if event["event"] == "Started"] == [0, stopping["step"]]
    assert [line["loss"] for line in lines(broken)] == [line["loss"] for line in lines(whole)]
    assert content(broken) == content(whole)
    assert scores(broken) == scores(whole)


@pytest.mark.slow
def test_fine_tuning_with_the_statistics_of_all_ranks_does_not_depend_on_their_number(one: Path, two: Path) -> None:
    for ours, theirs in zip(lines(one / "finetuned"), lines(two / "finetuned"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert scores(one / "finetuned") == scores(two / "finetuned")


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(one: Path, synthetic_shards: Path) -> None:
    shards, config = str(synthetic_shards), settings(LinearEvaluation, one / "linear")
    with pytest.raises(UserError, match=r"made with made_of\.encoder=.*start another run in another run\.dir"):
        evaluate_supervised(subject(seed=6), shards, shards, config, ALONE)
    with pytest.raises(UserError, match=r"made with train\.global_batch=6, now 3"):
        evaluate_supervised(subject(), shards, shards, replace(config, train=LinearTraining(global_batch=3)), ALONE)


@pytest.mark.slow
def test_a_classifiers_checkpoint_is_no_encoder_to_evaluate(one: Path) -> None:
    with pytest.raises(UserError, match="has no encoder and heads; name a checkpoint of pre-training"):
        load_subject(str(one / "finetuned"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"clips.stride": 3}, "clips.stride: found 3, must be a multiple of 2"), ({}, "nowhere/manifest.json: missing")],
)
def test_sets_that_cannot_be_used_are_told_before_anything_is_trained(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], message: str
) -> None:
    if change:
        monkeypatch.setattr(ShardSet, "_stored_frames", lambda _: 2)
    config = settings(LinearEvaluation, tmp_path, *(f"{key}={value}" for key, value in change.items()))
    test = str(synthetic_shards) if change else str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=message):
        evaluate_supervised(subject(), str(synthetic_shards), test, config, ALONE)
    assert not (tmp_path / "checkpoints").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

"""Protocols that train, on gloo ranks through DeepSpeed, on a real set and an encoder of a few channels."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from dataloading.stream import ShardSet
from launch.evaluate_settings import FinetuneEvaluation, LinearEvaluation, SupervisedEvaluation
from launch.settings import PretrainConfig
from launch.subject import RANDOM, Subject, load_subject
from launch.supervised import Lesson, Outcome, Rank, assembled, described_by, evaluate_supervised, pupil_of
from mcl_dist.accounts import Birth
from mcl_dist.batch import LabelledBatch
from mcl_dist.checkpoint import read_snapshot
from mcl_dist.config import build_config, load_config
from mcl_dist.engine import join_process_group, pick_device
from mcl_dist.errors import UserError
from mcl_dist.heartbeat import Heartbeat
from mcl_dist.ranks import Ranks
from mcl_dist.stopping import StopRequest

PRETRAINED = {
    "run": {"dir": "unused", "seed": 5},
    "data": {"train": "unused", "frames": 8, "stride": 4, "crop": 32},
    "encoder": {"width": 4, "blocks": [1, 1]},
    "heads": {"dim": 8},
}
SMALL = ("clips.frames=8", "clips.count=3", "train.global_batch=6", "data.threads=1", "checkpoint.keep=99")
STEPS = 8


def subject() -> Subject:
    return load_subject(RANDOM, build_config(PretrainConfig, PRETRAINED))


def settings(schema: type[SupervisedEvaluation], folder: Path, *more: str) -> SupervisedEvaluation:
    return load_config(schema, None, [f"run.dir={folder}", f"train.steps={STEPS}", *SMALL, *more])


def joined() -> Rank:
    device = pick_device()
    torch.set_num_threads(1)
    join_process_group(device)
    return Rank(Ranks(device), StopRequest(), Heartbeat(), Birth(0.0))


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> Path:
    return run / f"checkpoints/step-{STEPS:09d}"


def linear(shards: str, folder: str) -> None:
    rank = joined()
    outcome = evaluate_supervised(subject(), shards, shards, settings(LinearEvaluation, Path(folder)), rank)
    if outcome.scores:
        Path(folder, "scores.json").write_text(json.dumps(outcome.scores.to_json()))


class AskingAt(Heartbeat):
    """Asks to stop when a step begins."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__()
        self._step, self._stop = step, stop

    def begins_step(self, step: int) -> None:
        super().begins_step(step)
        if step == self._step:
            self._stop.ask("a test")


def finetuned(shards: str, folder: Path, rank: Rank, *more: str) -> Outcome:
    config = settings(FinetuneEvaluation, folder, "checkpoint.every=3", *more)
    outcome = evaluate_supervised(subject(), shards, shards, config, rank)
    if outcome.scores:
        (folder / "scores.json").write_text(json.dumps(outcome.scores.to_json()))
    return outcome


def finetune_whole_and_broken(shards: str, folder: str) -> None:
    """In one go; asked at one rank alone to stop, and again; and with statistics of all ranks."""
    rank, broken = joined(), Path(folder, "broken")
    assert finetuned(shards, Path(folder, "whole"), rank).is_done
    stop = StopRequest()
    asked = AskingAt(3, stop) if rank.ranks.is_first else Heartbeat()
    assert not finetuned(shards, broken, Rank(rank.ranks, stop, asked, rank.birth)).is_done
    torch.manual_seed(3)  # nothing of the process itself may matter
    assert finetuned(shards, broken, rank).is_done
    assert finetuned(shards, Path(folder, "of-two"), rank, "finetune.batch_norm=synchronized").is_done


def finetune_alone(shards: str, folder: str) -> None:
    assert finetuned(shards, Path(folder), joined(), "finetune.batch_norm=synchronized").is_done


def content(run: Path) -> dict[str, bytes]:
    """The last checkpoint but for its configuration, which names the run's folder."""
    files = {path.name: path.read_bytes() for path in last(run).iterdir()}
    state = json.loads(files.pop("state.json"))
    del state["config"], files["COMMITTED"]
    return files | {"state": json.dumps(state).encode()}


def linear_beside_plain_torch(shards: str, folder: str) -> None:
    """Train the layer, note what it saw, and train another one on that by PyTorch alone."""
    rank = joined()
    config = settings(LinearEvaluation, Path(folder))
    with closing(ShardSet(shards)) as train:
        lesson = Lesson(shards, train, train, subject().shown(config.clips), config)
        described = described_by(subject(), lesson)
        pupil = pupil_of(subject(), lesson, rank.ranks)
        plain = pupil_of(subject(), lesson, rank.ranks).network
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
    for step, ((features, labels), line) in enumerate(zip(seen[:STEPS], lines(Path(folder)), strict=True)):
        optimizer.param_groups[0]["lr"] = 1e-6 + (16.0 - 1e-6) * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = cross_entropy(plain.linear(features), labels)
        assert abs(float(loss.detach()) - line["loss"]) <= 1e-5 * abs(line["loss"]), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = read_snapshot(str(last(Path(folder)))).network
    for name, parameter in plain.named_parameters():
        assert (trained[name] - parameter).norm() <= 1e-5 * parameter.norm(), name


@pytest.mark.slow
def test_the_linear_layer_learns_as_by_plain_torch_on_the_same_features(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    run_ranks(__file__, "linear_beside_plain_torch", 1, synthetic_shards, tmp_path)


@pytest.mark.slow
def test_ranks_score_as_one_though_they_do_not_divide_the_test_videos(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path: Path
) -> None:
    for count in (1, 3):
        (tmp_path / str(count)).mkdir()
        run_ranks(__file__, "linear", count, synthetic_shards, tmp_path / str(count))
    alone, together = (json.loads((tmp_path / count / "scores.json").read_text()) for count in ("1", "3"))
    assert alone == together
    assert sum(map(sum, alone["confusion"])) == 16
    ours, theirs = (read_snapshot(str(last(tmp_path / count))).network for count in ("1", "3"))
    for name, value in ours.items():
        assert (theirs[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.fixture(scope="module")
def finetuned_runs(
    run_ranks: Callable[..., None], synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    run_ranks(__file__, "finetune_whole_and_broken", 2, synthetic_shards, folder)
    return folder


@pytest.mark.slow
def test_fine_tuning_that_was_stopped_and_resumed_equals_the_uninterrupted_to_the_bit(finetuned_runs: Path) -> None:
    whole, broken = finetuned_runs / "whole", finetuned_runs / "broken"
    events = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    (stopping,) = (event for event in events if event["event"] == "Stopping")
    assert 3 < stopping["step"] < STEPS
    assert [event["step"] for event in events if event["event"] == "Started"] == [0, stopping["step"]]
    assert [line["loss"] for line in lines(broken)] == [line["loss"] for line in lines(whole)]
    assert content(broken) == content(whole)
    assert (broken / "scores.json").read_text() == (whole / "scores.json").read_text()


@pytest.mark.slow
def test_fine_tuning_with_the_statistics_of_all_ranks_does_not_depend_on_their_number(
    run_ranks: Callable[..., None], synthetic_shards: Path, finetuned_runs: Path, tmp_path: Path
) -> None:
    run_ranks(__file__, "finetune_alone", 1, synthetic_shards, tmp_path)
    together = finetuned_runs / "of-two"
    for ours, theirs in zip(lines(tmp_path), lines(together), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((together / "scores.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"clips.stride": 3}, "clips.stride: found 3, must be a multiple of 2"), ({}, "nowhere/manifest.json: missing")],
)
def test_sets_that_cannot_be_used_are_told_before_anything_is_trained(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], message: str
) -> None:
    rank = Rank(Ranks(), StopRequest(), Heartbeat(), Birth(0.0))
    if change:
        monkeypatch.setattr(ShardSet, "_stored_frames", lambda _: 2)
    config = settings(LinearEvaluation, tmp_path, *(f"{key}={value}" for key, value in change.items()))
    test = str(synthetic_shards) if change else str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=message):
        evaluate_supervised(subject(), str(synthetic_shards), test, config, rank)
    assert not (tmp_path / "checkpoints").exists()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

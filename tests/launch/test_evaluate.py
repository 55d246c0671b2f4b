from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.evaluate import check_classes, load_subject
from launch.settings import PretrainConfig
from mcl_dist.config import build_config, dump_config
from mcl_dist.errors import UserError
from mcl_dist.heads import Network
from mcl_dist.learner import Learner
from mcl_dist.momentum import MomentumEncoder
from mcl_dist.negatives import Queue
from mcl_dist.ranks import Ranks

CONFIG = build_config(
    PretrainConfig,
    {
        "run": {"dir": "unused", "seed": 5},
        "data": {"train": "unused", "frames": 8, "stride": 4, "crop": 32},
        "encoder": {"width": 4, "blocks": [1, 1]},
        "heads": {"dim": 8},
    },
)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(CONFIG))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A run folder with the checkpoint of an encoder that was never trained, of another seed than `CONFIG`."""
    from mcl_dist.checkpoint import Checkpoints

    torch.manual_seed(11)
    network = Network(CONFIG.encoder, CONFIG.heads)
    momentum = MomentumEncoder(network, Ranks(), seed=0, autocast=False)
    learner = Learner(network, momentum, Queue(torch.rand(4, 8)))
    folder = tmp_path / "run" / "checkpoints"
    Checkpoints(str(folder), Ranks(), keep=1).save(learner.snapshot(3, {}, dataclasses.asdict(CONFIG)))
    return str(tmp_path / "run")


def _evaluate(checkpoint: str, shards: Path, *more: str) -> int:
    sets = ("--train", str(shards), "--test", str(shards), "--clips", "2")
    return main(["evaluate", "svm", "--checkpoint", checkpoint, *sets, *more])


def test_json_names_top1_top5_and_videos(
    checkpoint: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"top1", "top5", "videos"}
    assert found["videos"] == 16
    assert 0 <= found["top1"] <= found["top5"] <= 1


def test_an_evaluation_repeats_exactly(
    config_file: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for _ in range(2):
        assert _evaluate("random", synthetic_shards, "--config", config_file) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("top-1 ")


def test_a_checkpoint_brings_its_own_clips_and_encoder(checkpoint: str) -> None:
    subject = load_subject(checkpoint, None)
    assert dataclasses.astuple(subject.geometry) == (8, 4, 32)
    assert subject.encoder.config == CONFIG.encoder


def test_a_configuration_beside_a_checkpoint_changes_the_clips(checkpoint: str, config_file: str) -> None:
    subject = load_subject(checkpoint, config_file, ["data.frames=16"])
    assert subject.geometry.frames == 16


def test_random_is_the_start_of_a_run_of_that_seed(config_file: str) -> None:
    torch.manual_seed(5)
    expected = Network(CONFIG.encoder, CONFIG.heads).encoder.state_dict()
    found = load_subject("random", config_file).encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_architecture_is_refused_in_one_line(
    checkpoint: str, config_file: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "--config", config_file, "encoder.width=8") == 1
    error = capsys.readouterr().err
    assert "another architecture" in error
    assert error.count("\n") == 1


def test_a_missing_checkpoint_is_told_in_one_line(
    tmp_path: Path, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(str(tmp_path / "nowhere"), synthetic_shards) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in error
    assert error.count("\n") == 1


def test_a_missing_shard_set_is_told_in_one_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, tmp_path / "no-set") == 1
    error = capsys.readouterr().err
    assert "no-set/manifest.json" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("run.seed=1",)])
def test_random_without_a_configuration_is_wrong_usage(
    more: tuple[str, ...], synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate("random", synthetic_shards, *more) == 2
    assert "--config" in capsys.readouterr().err


def test_an_override_without_a_configuration_is_wrong_usage(checkpoint: str, synthetic_shards: Path) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "data.crop=16") == 2


@pytest.mark.parametrize("option", [("--clips", "0"), ("--cost", "-1")])
def test_impossible_numbers_are_wrong_usage(option: tuple[str, str], synthetic_shards: Path) -> None:
    with pytest.raises(SystemExit) as left:
        _evaluate("random", synthetic_shards, *option)
    assert left.value.code == 2


def test_sets_of_other_classes_are_refused() -> None:
    check_classes("a", ("run", "walk"), "b", ("run", "walk"))
    with pytest.raises(UserError, match="`walk` is in one alone"):
        check_classes("a", ("run", "walk"), "b", ("run",))

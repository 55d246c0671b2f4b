from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloading.shards.format import MANIFEST, parse_manifest
from launch.cli.main import main
from launch.evaluation.encoder_under_test import EncoderUnderTest, load_encoder_under_test, load_pretrain_config
from launch.evaluation.frozen_protocols import evaluate_frozen
from launch.evaluation.inputs import check_classes, check_split
from launch.evaluation.results_log import read_results
from launch.run.config import PretrainConfig
from mcl_dist.config import build_config, dump_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.evaluation.feature_cache import module_digest
from mcl_dist.evaluation.metrics import Scores
from mcl_dist.model.network import Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.training.pretrain_state import PretrainState

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


def _save_checkpoint(run: str, step: int) -> None:
    """Write a checkpoint of an untrained network with a seed that depends on the step."""
    from mcl_dist.checkpoint import CheckpointManager

    torch.manual_seed(8 + step)
    network = Network(CONFIG.encoder, CONFIG.heads)
    momentum = MomentumEncoder(network, ProcessGroup(), seed=0, autocast=False)
    state = PretrainState(network, momentum, NegativeQueue(torch.rand(4, 8)))
    CheckpointManager(f"{run}/checkpoints", ProcessGroup()).save(state.shard(step, {}, dataclasses.asdict(CONFIG)))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A run folder with a checkpoint of step 3; its seed differs from `CONFIG`'s."""
    _save_checkpoint(str(tmp_path / "run"), step=3)
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the feature cache, below a temporary home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "mcl-dist" / "features"


def _evaluate(checkpoint: str, shards: Path, *more: str, protocol: str = "svm", test: Path | None = None) -> int:
    sets = ("--train", str(shards), "--test", str(test or shards), "--clips", "2")
    return main(["evaluate", protocol, "--checkpoint", checkpoint, *sets, *more])


def _changed(shards: Path, folder: Path, classes: tuple[str, ...]) -> Path:
    """Copy the set with other class names."""
    shutil.copytree(shards, folder)
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), MANIFEST)
    (folder / MANIFEST).write_bytes(dataclasses.replace(manifest, classes=classes).to_json())
    return folder


def _classes(shards: Path) -> tuple[str, ...]:
    return parse_manifest((shards / MANIFEST).read_bytes(), MANIFEST).classes


@pytest.mark.parametrize("protocol", ["svm", "knn", "retrieval"])
def test_json_has_scores_intervals_classes_and_confusion(
    checkpoint: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "--json", protocol=protocol) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["protocol"], found["videos"]) == (protocol, 16)
    assert 0 <= found["top1"] <= found["top5"] <= 1
    measures = {"top1", "top5", "mean_class"} | (
        {f"recall_at_{count}" for count in (1, 5, 10, 20, 50)} if protocol == "retrieval" else set()
    )
    assert set(found["intervals"]) == measures
    (split,) = found["splits"]
    assert {name: split[name] for name in measures} == {name: found[name] for name in measures}
    assert [each["name"] for each in split["classes"]] == list(_classes(synthetic_shards))
    assert sum(map(sum, split["confusion"])) == 16
    if protocol != "svm":
        assert found["top1"] == 1  # a video's nearest neighbour is itself


def test_several_splits_are_reported_with_their_mean(
    checkpoint: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("--train", str(synthetic_shards), "--test", str(synthetic_shards), "--json")
    assert _evaluate(checkpoint, synthetic_shards, *again, protocol="knn") == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["splits"]), found["videos"]) == (2, 32)
    assert found["top1"] == found["splits"][0]["top1"]


def test_all_splits_evaluate_the_checkpoint_that_was_the_newest_at_the_start(
    checkpoint: str, synthetic_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []

    def evaluate_during_training(under_test: EncoderUnderTest, *arguments: Any) -> Scores | None:
        _save_checkpoint(checkpoint, step=4 + len(digests))
        digests.append(module_digest(under_test.encoder))
        return evaluate_frozen(under_test, *arguments)

    (Path(checkpoint) / "config.yaml").write_text(dump_config(CONFIG))
    monkeypatch.setattr("launch.evaluation.frozen_protocols.evaluate_frozen", evaluate_during_training)
    again = ("--train", str(synthetic_shards), "--test", str(synthetic_shards))
    assert _evaluate(checkpoint, synthetic_shards, *again, protocol="knn") == 0
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert [line["step"] for line in read_results(Path(checkpoint))] == [3]


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_evaluated(
    checkpoint: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save_checkpoint(checkpoint, step=5)
    network = Path(checkpoint) / "checkpoints" / "step-000000005" / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-1])
    assert _evaluate(checkpoint, synthetic_shards, protocol="knn") == 0
    errors = capsys.readouterr().err
    assert "step-000000005: network.safetensors" in errors
    assert "step-000000003 instead" in errors


def test_different_numbers_of_training_and_test_sets_are_a_usage_error(checkpoint: str, synthetic_shards: Path) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "--train", str(synthetic_shards)) == 2


def test_a_second_protocol_reuses_the_features_of_the_first(
    checkpoint: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str], features: Path
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, protocol="knn") == 0
    assert "cached in" in capsys.readouterr().err
    assert len(list(features.iterdir())) == 1  # both sets are the same
    assert _evaluate(checkpoint, synthetic_shards, protocol="retrieval") == 0
    assert capsys.readouterr().err.count("read from") == 2
    assert _evaluate(checkpoint, synthetic_shards, "clips.crops=3", protocol="retrieval") == 0
    assert "read from" not in capsys.readouterr().err.splitlines()[0]


@pytest.mark.slow
def test_three_ranks_extract_the_features_of_one_although_they_do_not_divide_the_videos(
    checkpoint: str, synthetic_shards: Path, capfd: pytest.CaptureFixture[str], features: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like three ranks of a small machine; more threads change the last bit of sums
    try:
        assert _evaluate(checkpoint, synthetic_shards, "--json") == 0
    finally:
        torch.set_num_threads(threads)
    alone = json.loads(capfd.readouterr().out)
    (file,) = features.iterdir()
    expected = file.read_bytes()
    file.unlink()
    assert _evaluate(checkpoint, synthetic_shards, "--json", "--ranks", "3") == 0
    assert json.loads(capfd.readouterr().out) == alone
    assert file.read_bytes() == expected


def test_killed_ranks_are_reported_in_one_line(
    checkpoint: str, synthetic_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.evaluation.launch_job.launch_ranks", lambda *_: 247)
    assert _evaluate(checkpoint, synthetic_shards, "--ranks", "2") == 1
    assert capsys.readouterr().err.endswith("for lack of memory; use fewer --ranks\n")


def test_an_evaluation_repeats_exactly(
    config_file: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for _ in range(2):
        assert _evaluate("random", synthetic_shards, "--config", config_file, "--cost", "2") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("top-1 ")


def test_random_takes_a_pretraining_configuration_beside_the_evaluation_configuration(
    config_file: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--pretrain", config_file, "--config", "configs/evaluate/svm.yaml", "--json")
    found = []
    for seed in ("5", "5", "6"):
        assert _evaluate("random", synthetic_shards, *both, f"pretrain.run.seed={seed}", "svm.cost=2") == 0
        found.append(capsys.readouterr().err.count("read from"))
    assert found == [1, 2, 1]  # both sets are the same; the second 5 reuses the features, 6 is another encoder


def test_a_checkpoint_determines_the_clips_and_the_encoder(checkpoint: str) -> None:
    under_test = load_encoder_under_test(checkpoint)
    assert dataclasses.astuple(under_test.geometry) == (8, 4, 32)
    assert under_test.encoder.config == CONFIG.encoder


def test_an_evaluation_can_use_other_clips_than_the_pretraining(checkpoint: str) -> None:
    from dataloading.loader.probe_clips import ClipsConfig

    geometry = load_encoder_under_test(checkpoint).clip_geometry(ClipsConfig(frames=16))
    assert dataclasses.astuple(geometry) == (16, 4, 32)


def test_random_is_the_initial_encoder_of_a_run_with_that_seed(config_file: str) -> None:
    torch.manual_seed(5)
    expected = Network(CONFIG.encoder, CONFIG.heads).encoder.state_dict()
    found = load_encoder_under_test("random", load_pretrain_config(config_file)).encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_missing_checkpoint_is_reported_in_one_line(
    tmp_path: Path, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(str(tmp_path / "nowhere"), synthetic_shards) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in error
    assert error.count("\n") == 1


def test_a_missing_shard_set_is_reported_in_one_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, tmp_path / "no-set") == 1
    error = capsys.readouterr().err
    assert "no-set/manifest.json" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("run.seed=1",)])
def test_random_without_a_configuration_is_a_usage_error(
    more: tuple[str, ...], synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate("random", synthetic_shards, *more) == 2
    assert "--pretrain" in capsys.readouterr().err


def test_a_pretraining_configuration_beside_a_checkpoint_is_a_usage_error(
    checkpoint: str, config_file: str, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "--pretrain", config_file) == 2
    assert "--pretrain: configures --checkpoint random" in capsys.readouterr().err


def test_an_override_without_a_pretraining_configuration_is_a_usage_error(
    checkpoint: str, synthetic_shards: Path
) -> None:
    assert _evaluate(checkpoint, synthetic_shards, "pretrain.data.crop=16") == 2


def test_an_unknown_key_is_a_usage_error_before_any_set_is_read(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate(checkpoint, tmp_path / "no-set", "knn.neighbors=3", protocol="knn") == 2
    assert "knn.neighbors: unknown key; did you mean `neighbours`?" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--clips", "0"), ("--cost", "-1")])
def test_impossible_numbers_are_usage_errors(option: tuple[str, str], synthetic_shards: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        _evaluate("random", synthetic_shards, *option)
    assert exit_info.value.code == 2


def test_sets_with_different_classes_are_refused() -> None:
    check_classes("a", ("run", "walk"), "b", ("run", "walk"))
    with pytest.raises(UserError, match="only one set has `walk`"):
        check_classes("a", ("run", "walk"), "b", ("run",))


def test_sets_without_labels_or_without_training_videos_are_refused_in_one_line(
    checkpoint: str, synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = _classes(synthetic_shards)
    unlabelled = _changed(synthetic_shards, tmp_path / "unlabelled", ("unlabelled", *others))
    empty = _changed(synthetic_shards, tmp_path / "empty", (first, *others, "zz"))
    for shards, message in ((unlabelled, "videos without a label"), (empty, "class `zz` has no training video")):
        assert _evaluate(checkpoint, shards) == 1
        error = capsys.readouterr().err
        assert message in error
        assert str(shards) in error
        assert error.count("\n") == 1


def test_a_class_without_a_test_video_is_reported_and_left_out_of_the_mean(
    synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataloading.reading.shard_set import ShardSet

    empty = _changed(synthetic_shards, tmp_path / "empty", (*_classes(synthetic_shards), "zz"))
    train, test = ShardSet(str(empty)), ShardSet(str(empty))
    train.labels, test.labels = np.arange(17), np.arange(16)
    check_split("train", train, "test", test, warn=False)
    assert not capsys.readouterr().err
    check_split("train", train, "test", test, warn=True)
    assert "test: class `zz` has no video; the mean over classes leaves it out" in capsys.readouterr().err


def test_a_stride_that_the_set_does_not_store_is_refused_in_one_line(
    checkpoint: str, tmp_path: Path, synthetic_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "every-third"
    shutil.copytree(synthetic_shards, folder)
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), MANIFEST)
    changed = dataclasses.replace(manifest, build={**manifest.build, "keep_every": 3})
    (folder / MANIFEST).write_bytes(changed.to_json())
    assert _evaluate(checkpoint, folder) == 2
    assert "clips.stride: found 4, must be a multiple of 3" in capsys.readouterr().err

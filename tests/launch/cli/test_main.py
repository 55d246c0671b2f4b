"""Parsing of the `mcl` command line."""

from __future__ import annotations

import pytest

from launch.cli.main import main
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")


def test_overrides_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pretrain", "train.global_batch=3", "--config", CONFIG, "data.train=nowhere", "--ranks", "2"]
    arguments += ["train.steps=1"]
    assert main(arguments) == 2
    assert "mcl: train.global_batch: 3 is not divisible by 2 ranks" in capsys.readouterr().err
    assert main([*arguments, "train.global_batch=5"]) == 2
    assert "5 is not divisible" in capsys.readouterr().err, "the last override of a key counts"


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["pretrain", "train.steps=1", "--config", CONFIG, "--stepz", "3"], "--stepz 3"),
        (["pretrain", "train.steps=1", "--config", CONFIG, "steps"], "steps"),
        (["shards", "verify", "set", "train.steps=1"], "train.steps=1"),
    ],
)
def test_unknown_arguments_are_refused(arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {unknown}\n")

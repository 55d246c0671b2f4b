from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.supervision.deepspeed_launcher import launch_ranks


def visible(folder: Path, num_ranks: int) -> set[str]:
    """What so many ranks see in CUDA_VISIBLE_DEVICES."""
    script = folder / "rank.py"
    script.write_text(
        "import os, pathlib\n"
        "seen = pathlib.Path(__file__).with_name('seen-' + os.environ['RANK'])\n"
        "seen.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    assert launch_ranks(str(script), [], num_ranks) == 0
    seen = [file.read_text() for file in folder.glob("seen-*")]
    assert len(seen) == num_ranks
    return set(seen)


@pytest.mark.slow
def test_gpus_that_are_hidden_stay_hidden_from_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible(tmp_path, 2) == {"-1,-1"}


@pytest.mark.slow
def test_ranks_get_the_gpus_that_were_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # for the launcher, which has no GPU here
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,1")
    assert visible(tmp_path, 2) == {"5,3"}

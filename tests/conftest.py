"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """A folder of class folders of real clips, which a user's clone does not have."""
    folder = Path(os.environ.get("MCL_VIDEOS", REPOSITORY.parent / "shared" / "videos"))
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder} is missing; name a folder of class folders in MCL_VIDEOS")
    return folder


@pytest.fixture(scope="session")
def synthetic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 16 synthetic videos, one a class."""
    from dataloading.synthetic import write_synthetic
    from launch.cli import main

    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, seed=0, train_per_class=1, test_per_class=0)
    arguments = ["shards", "build", str(folder / "train"), str(folder / "shards"), "--flow", "dis", "--short-side", "0"]
    assert main(arguments) == 0
    return folder / "shards"

"""Fixtures that tests of several packages use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from tests.support.gloo_ranks import run_gloo_ranks
from tests.support.paths import REPOSITORY
from tests.support.s3 import S3Store, running_store


def pytest_configure() -> None:
    """Restore Ctrl-C, here and in programs under test: a shell's background processes ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` without a CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """A folder of class folders of real clips, named by MCL_VIDEOS; the repository contains none."""
    folder = Path(os.environ.get("MCL_VIDEOS", REPOSITORY.parent / "shared" / "videos"))
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder} is missing; set MCL_VIDEOS to their folder")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of vectors that the reference implementation computed; MCL_GOLDEN names another one."""
    return Path(os.environ.get("MCL_GOLDEN", REPOSITORY / "tests" / "golden" / "vectors"))


@pytest.fixture(scope="session")
def synthetic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 16 synthetic videos, one for each class."""
    from dataloading.synthetic.videos import write_synthetic
    from launch.cli.main import main

    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, seed=0, train_per_class=1, test_per_class=0)
    arguments = ["shards", "build", str(folder / "train"), str(folder / "shards"), "--flow", "dis", "--short-side", "0"]
    assert main(arguments) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    """A running S3 store."""
    with running_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def s3_url(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a new bucket, with the credentials for it in the environment."""
    from s3fs import S3FileSystem

    for name, value in s3_store.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid4().hex[:12]}"
    S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/set"
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(file, function, count, *arguments)`: see `run_gloo_ranks`."""
    return run_gloo_ranks

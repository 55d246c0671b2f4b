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

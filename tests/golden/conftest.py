"""Where the vectors of the reference implementation lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors, which a user's clone does not have."""
    folder = Path(os.environ.get("MCL_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden vectors: {folder} is missing; name their folder in MCL_GOLDEN")
    return folder

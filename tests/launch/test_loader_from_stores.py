from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.faultproxy import KINDS
from tests.s3 import S3Store
from tests.stores import behind_http, behind_s3

SMALL = ["data.crop=56", "data.frames=4", "data.stride=8"]


@pytest.fixture
def digest(capsys: pytest.CaptureFixture[str]) -> Any:
    def played(url: str, num_ranks: int, num_epochs: int, *overrides: str) -> str:
        """Of some epochs' batches: ids, boxes, pixels."""
        command = ["bench", "loader", "--data", url, "--epochs", str(num_epochs), "--world-size", str(num_ranks)]
        assert main([*command, "--fingerprint", "--json", *SMALL, *overrides]) == 0
        return str(json.loads(capsys.readouterr().out)["digest"])

    return played


@pytest.mark.slow
def test_batches_from_s3_are_those_from_the_disk_when_requests_fail(
    synthetic_shards: Path, s3_store: S3Store, s3_url: str, monkeypatch: pytest.MonkeyPatch, digest: Any
) -> None:
    with behind_s3(synthetic_shards, s3_store, s3_url, monkeypatch) as (url, proxy):
        proxy.share = 0.3
        assert digest(url, 2, 2, "data.request_seconds=2") == digest(str(synthetic_shards), 1, 2)
        assert proxy.injected


@pytest.mark.slow
def test_batches_from_http_ranges_are_those_from_the_disk_when_requests_fail(
    synthetic_shards: Path, tmp_path: Path, digest: Any
) -> None:
    with behind_http(synthetic_shards, tmp_path / "nginx") as (url, proxy):
        proxy.share = 0.3
        found = digest(url, 1, 1, "data.fetch=ranges", "data.request_seconds=0.3")
        assert found == digest(str(synthetic_shards), 2, 1)
        assert set(proxy.injected) == KINDS

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main
from tests.support.faultproxy import KINDS
from tests.support.stores import behind_http, behind_s3

SMALL = ["data.crop=56", "data.frames=4", "data.stride=8"]


@pytest.fixture
def digest(capsys: pytest.CaptureFixture[str]) -> Any:
    def loader_digest(url: str, num_ranks: int, num_epochs: int, *overrides: str) -> str:
        """Digest of the batches: ids, boxes, pixels."""
        command = ["bench", "loader", "--data", url, "--epochs", str(num_epochs), "--world-size", str(num_ranks)]
        assert main([*command, "--fingerprint", "--json", *SMALL, *overrides]) == 0
        return str(json.loads(capsys.readouterr().out)["digest"])

    return loader_digest


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["whole", "ranges"])
@pytest.mark.parametrize("store", ["s3", "http"])
def test_batches_from_a_failing_store_equal_those_from_disk(
    synthetic_shards: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    digest: Any,
    store: str,
    fetch: str,
) -> None:
    if store == "s3":
        s3 = request.getfixturevalue("s3_store"), request.getfixturevalue("s3_url")
        reached = behind_s3(synthetic_shards, *s3, monkeypatch)
    else:
        reached = behind_http(synthetic_shards, tmp_path / "nginx")
    with reached as (url, proxy):
        proxy.share = 0.3
        found = digest(url, 2, 2, f"data.fetch={fetch}", "data.request_seconds=1")
        assert found == digest(str(synthetic_shards), 1, 2)
        assert set(proxy.injected) == KINDS if fetch == "ranges" else proxy.injected

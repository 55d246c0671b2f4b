"""Shard sets in real stores, behind a proxy that makes three of ten requests fail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataloading.reading.fetcher import FetchConfig
from dataloading.reading.shard_set import ShardSet
from mcl_dist.errors import UserError
from tests.support.faultproxy import FaultProxy
from tests.support.s3 import SECRET, S3Store
from tests.support.stores import behind_http, behind_s3

WriteSet = Callable[..., Path]
LENGTHS = [9, 12, 8, 20, 10, 9, 14, 11]
REASONS = {"503": "server_error", "reset": "reset", "stall": "stall", "short": "short_body", "flip": "wrong_digest"}


def fingerprint(shards: ShardSet) -> str:
    """Digest of everything that can be read of a set, in random order across shards."""
    digest = hashlib.sha256()
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    shards.expect(order)
    for position in order:
        video = shards.read(position)
        for part in (*video.frames(range(video.num_frames)), *video.flow(range(video.num_frames))):
            digest.update(part)
        digest.update(repr((str(shards.keys[position]), video.info())).encode())
        digest.update(video.frame_maps.tobytes() + video.clip_scores.tobytes())
    shards.close()
    return digest.hexdigest()


@pytest.fixture
def folder(write_set: WriteSet) -> Path:
    return write_set(LENGTHS, per_shard=1)


def check_identity(folder: Path, url: str, proxy: FaultProxy, cache: Path, fetch: str) -> None:
    proxy.share = 0.3
    shards = ShardSet(url, str(cache), FetchConfig(fetch=fetch, request_seconds=2.0))
    assert fingerprint(shards) == fingerprint(ShardSet(str(folder)))
    counters = shards.counters()
    assert {kind: counters["retries"][reason] for kind, reason in REASONS.items()} == {
        kind: proxy.injected[kind] for kind in REASONS
    }
    assert counters["retries"]["unreachable"] == counters["cache_repairs"] == 0
    assert counters["requests"] == sum(proxy.requests.values())
    assert set(proxy.injected) == set(REASONS)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_a_set_on_s3_reads_the_same_with_faults_and_each_fault_is_counted(
    folder: Path, tmp_path: Path, s3_store: S3Store, s3_url: str, monkeypatch: pytest.MonkeyPatch, fetch: str
) -> None:
    with behind_s3(folder, s3_store, s3_url, monkeypatch) as (url, proxy):
        check_identity(folder, url, proxy, tmp_path / "cache", fetch)


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_a_set_over_http_reads_the_same_with_faults_and_each_fault_is_counted(
    folder: Path, tmp_path: Path, fetch: str
) -> None:
    with behind_http(folder, tmp_path / "nginx") as (url, proxy):
        check_identity(folder, url, proxy, tmp_path / "cache", fetch)


@pytest.mark.parametrize("kind", ["503", "reset", "stall", "short", "flip"])
def test_a_store_that_keeps_failing_is_a_one_line_error_after_the_deadline(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    with behind_http(folder, tmp_path / "nginx") as (url, proxy):
        shards = ShardSet(url, str(tmp_path / "cache"), FetchConfig(retry_seconds=0.4, request_seconds=0.1))
        proxy.share, proxy.kinds = 1.0, frozenset([kind])
        with pytest.raises(UserError) as raised:
            shards.read(0)
        proxy.share = 0.0
        assert len(shards.read(0).frames([0])) == 1
    message = str(raised.value)
    assert message.startswith(f"{url}/shard-000000.tar: ")
    assert "; given up after" in message
    assert "\n" not in message
    retries = shards.counters()["retries"]
    assert retries[REASONS[kind]] == sum(retries.values()) > 1


def test_an_unreachable_store_is_a_one_line_error(folder: Path, tmp_path: Path) -> None:
    with behind_http(folder, tmp_path / "nginx") as (url, _):
        pass
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:\d+/set/manifest\.json: .*; given up"):
        ShardSet(url, str(tmp_path / "cache"), FetchConfig(retry_seconds=0.2))


def test_names_and_errors_contain_no_credentials_of_the_url(folder: Path, tmp_path: Path) -> None:
    with behind_http(folder, tmp_path / "nginx") as (url, proxy):
        secret = url.replace("://", f"://user:{SECRET}@")
        shards = ShardSet(secret, str(tmp_path / "cache"), FetchConfig(retry_seconds=0.1, request_seconds=0.1))
        name = shards.read(0).where + shards.name_of(0)
        proxy.share = 1.0
        with pytest.raises(UserError) as raised:
            shards.read(1)
    with pytest.raises(UserError) as missing:
        ShardSet(f"{secret}/elsewhere", str(tmp_path / "cache"), FetchConfig(retry_seconds=0.1))
    for text in (name, str(raised.value), str(missing.value)):
        assert SECRET not in text
        assert "http://127.0.0.1" in text

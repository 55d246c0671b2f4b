"""Shard sets in real stores, behind a proxy that injects faults once its `share` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcl_dist.storage.folder import Folder
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.nginx import running_nginx
from tests.support.s3 import S3Store

SEED = 15  # draws few stalls, which take long, and all kinds of faults within the first 20 requests


@contextmanager
def behind_s3(
    folder: Path, store: S3Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, FaultProxy]]:
    """Copy the set to the bucket at `url`; yields its URL and the proxy that serves it."""
    from s3fs import S3FileSystem

    target = Folder(url)
    for path in folder.iterdir():
        target.put(path, path.name)
    with fault_proxy(store.endpoint, SEED, share=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        Folder(url).read_range("manifest.json", 0, 1)  # the first request loads the library's service data
        proxy.requests.clear()
        yield url, proxy


@contextmanager
def behind_http(folder: Path, work: Path) -> Iterator[tuple[str, FaultProxy]]:
    """Serve the set over HTTP; yields its URL and the proxy that serves it."""
    with running_nginx(work, folder.parent) as url, fault_proxy(url, SEED, share=0) as proxy:
        yield f"{proxy.url}/{folder.name}", proxy

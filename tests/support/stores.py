"""Sets in real stores, behind a proxy that can make requests fail; it does once its `share` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataloading.reading.store import Store
from mcl_dist.storage.folder import Folder
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.nginx import running_nginx
from tests.support.s3 import S3Store

SEED = 15  # of few stalls, which take long, and all kinds of faults among the first 20 requests


@contextmanager
def behind_s3(
    folder: Path, store: S3Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, FaultProxy]]:
    """The set in the bucket at `url`, to be reached through a proxy."""
    from s3fs import S3FileSystem

    target = Folder(url)
    for path in folder.iterdir():
        target.put(path, path.name)
    with fault_proxy(store.endpoint, SEED, share=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        Store(url).read("manifest.json", 0, 1, 30)  # the first loads what the library needs to know
        proxy.requests.clear()
        yield url, proxy


@contextmanager
def behind_http(folder: Path, work: Path) -> Iterator[tuple[str, FaultProxy]]:
    """The set at http://, to be reached through a proxy."""
    with running_nginx(work, folder.parent) as url, fault_proxy(url, SEED, share=0) as proxy:
        yield f"{proxy.url}/{folder.name}", proxy

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.faultproxy import KINDS, FaultProxy, fault_proxy
from tests.support.s3 import S3Store

DATA = bytes(range(256)) * 40


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(DATA)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def get(proxy: FaultProxy, timeout: float = 10) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout)
    try:
        connection.request("GET", "/file")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_without_faults_the_response_is_the_stores(upstream: str) -> None:
    with fault_proxy(upstream, share=0.0) as proxy:
        assert get(proxy) == (200, DATA)
        assert not proxy.injected
        assert proxy.requests == {"GET": 1}


def test_every_kind_of_fault_has_its_effect(upstream: str) -> None:
    with fault_proxy(upstream, share=1.0, kinds={"503"}) as proxy:
        assert get(proxy)[0] == 503
        proxy.kinds = frozenset({"reset"})
        with pytest.raises(ConnectionResetError):
            get(proxy)
        proxy.kinds = frozenset({"stall"})
        with pytest.raises(TimeoutError):
            get(proxy, timeout=0.2)
        proxy.kinds = frozenset({"short"})
        with pytest.raises(http.client.IncompleteRead):
            get(proxy)
        proxy.kinds = frozenset({"flip"})
        differing = [(found, sent) for found, sent in zip(get(proxy)[1], DATA, strict=True) if found != sent]
        assert len(differing) == 1
        assert dict(proxy.injected) == dict.fromkeys(KINDS, 1)


def test_the_seed_decides_which_share_of_the_requests_gets_a_fault(upstream: str) -> None:
    statuses = []
    for _ in range(2):
        with fault_proxy(upstream, seed=3, share=0.3, kinds={"503"}) as proxy:
            statuses.append([get(proxy)[0] for _ in range(40)])
            assert proxy.injected["503"] == statuses[-1].count(503)
    assert statuses[0] == statuses[1]
    assert 5 < statuses[0].count(503) < 20


def test_requests_to_which_no_fault_applies_pass(upstream: str) -> None:
    with fault_proxy(upstream, share=1.0, applies=lambda method, _: method == "PUT") as proxy:
        assert get(proxy) == (200, DATA)


@pytest.mark.slow
def test_an_s3_client_works_through_the_proxy(s3_store: S3Store) -> None:
    from s3fs import S3FileSystem

    with fault_proxy(s3_store.endpoint, share=0.0) as proxy:
        store = S3FileSystem(
            key=s3_store.environment["AWS_ACCESS_KEY_ID"],
            secret=s3_store.environment["AWS_SECRET_ACCESS_KEY"],
            client_kwargs={"endpoint_url": proxy.url, "region_name": "us-east-1"},
            skip_instance_cache=True,
        )
        store.mkdir("through-a-proxy")
        store.pipe_file("through-a-proxy/file", DATA)
        assert store.cat_file("through-a-proxy/file", start=5, end=900) == DATA[5:900]
        assert store.ls("through-a-proxy", detail=False) == ["through-a-proxy/file"]
        assert proxy.requests["PUT"] == 2

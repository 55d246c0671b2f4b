"""An HTTP proxy in front of a store that injects the faults of real stores and networks into a share of requests."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import urlsplit

KINDS = frozenset(("503", "reset", "stall", "short", "flip"))
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_HEADERS = frozenset(("connection", "keep-alive", "transfer-encoding", "expect", "content-length"))
CHUNK_END = b"\r\n"


@dataclass
class FaultProxy:
    """A running proxy; changed attributes apply from the next request on.

    Attributes:
        url: of the proxy, used in place of the store's.
        seed: of the faults.
        share: fraction of the requests that get a fault.
        kinds: the faults to choose from: `503` (without a request to the store), `reset` (of the connection, before or
            after the request to the store), `stall` (no response until the proxy ends), `short` (half of the body),
            `flip` (one bit of a GET's body).
        applies: whether a request may get a fault, by method and path.
        injected: number of faults by kind.
        requests: number of requests by method.
    """

    url: str
    seed: int
    share: float
    kinds: frozenset[str]
    applies: Callable[[str, str], bool]
    injected: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._number = count()
        self._lock = threading.Lock()

    def draw(self, method: str, path: str) -> tuple[str, random.Random]:
        """The fault of the next request ("" for none), and a generator for its details."""
        with self._lock:
            self.requests[method] += 1
            rng = random.Random(f"{self.seed}/{next(self._number)}")
        # Only a GET has a response body to change.
        kinds = sorted(self.kinds if method == "GET" else self.kinds - {"flip"})
        if not kinds or rng.random() >= self.share or not self.applies(method, path):
            return "", rng
        kind = rng.choice(kinds)
        with self._lock:
            self.injected[kind] += 1
        return kind, rng


@contextmanager
def fault_proxy(
    upstream_url: str,
    seed: int = 0,
    share: float = 0.2,
    kinds: Iterable[str] = KINDS,
    applies: Callable[[str, str], bool] = lambda _method, _path: True,
) -> Iterator[FaultProxy]:
    """Run a `FaultProxy` on a free loopback port until the block ends."""
    if unknown := set(kinds) - KINDS:
        raise ValueError(f"unknown kinds of fault: {sorted(unknown)}")
    server = _Server(urlsplit(upstream_url).netloc)
    server.proxy = proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", seed, share, frozenset(kinds), applies)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultProxy

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def forward(self) -> None:
        body = _body(self)
        fault, rng = self.server.proxy.draw(self.command, self.path)
        if fault == "503":
            self.respond(503, [("Content-Type", "application/xml")], BUSY)
        elif fault == "stall":
            self.server.closing.wait()
            self.close_connection = True
        elif fault == "reset" and rng.random() < 0.5:
            _reset(self)
        else:
            self.respond_with(fault, rng, *_forward(self.server.upstream, self, body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 (names that the base class calls)

    def respond_with(
        self, fault: str, rng: random.Random, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        if fault == "reset" or (fault == "short" and not body):
            _reset(self)
        elif fault == "flip" and body:
            changed = bytearray(body)
            changed[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            self.respond(status, headers, bytes(changed))
        else:
            self.respond(status, headers, body, cut=fault == "short")

    def respond(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, http.client.HTTPException):  # the client or the store closed the connection
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()


def _forward(upstream: str, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """The store's response: status, headers, body."""
    connection = http.client.HTTPConnection(upstream, timeout=60)
    try:
        # The client's signature covers the host, so it stays the proxy's.
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in HOP_HEADERS:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        dropped = HOP_HEADERS - {"content-length"} if request.command == "HEAD" else HOP_HEADERS
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        return response.status, headers, response.read()
    finally:
        connection.close()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    chunks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        chunks.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline() != CHUNK_END:
        pass  # trailers
    return b"".join(chunks)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close the socket without linger, which the client sees as "connection reset by peer"."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True

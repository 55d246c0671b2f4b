"""An HTTP proxy in front of a store that breaks a share of the answers, in ways that stores and networks have."""

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
OF_ONE_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "expect", "content-length"))
CHUNK_END = b"\r\n"


@dataclass
class FaultProxy:
    """A running proxy; what is set here holds from the next request on.

    Attributes:
        url: what to talk to in place of the store.
        share: of the requests, that meets a fault.
        kinds: the faults to choose from: `503` (the store is not asked), `reset` (the connection is, before or after
            the store was asked), `stall` (no answer for as long as the proxy lives), `short` (the body ends half-way),
            `flip` (one byte of a GET's body is another).
        applies: which requests may meet one, by method and path; the others pass.
        injected: how many faults there were, by kind.
        requests: how many requests there were, by method.
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
        """The fault of the next request, "" for none, and a generator for its details."""
        with self._lock:
            self.requests[method] += 1
            chance = random.Random(f"{self.seed}/{next(self._number)}")
        # Whatever is not a GET brings no body that could be changed.
        kinds = sorted(self.kinds if method == "GET" else self.kinds - {"flip"})
        if not kinds or chance.random() >= self.share or not self.applies(method, path):
            return "", chance
        kind = chance.choice(kinds)
        with self._lock:
            self.injected[kind] += 1
        return kind, chance


@contextmanager
def fault_proxy(
    upstream_url: str,
    seed: int = 0,
    share: float = 0.2,
    kinds: Iterable[str] = KINDS,
    applies: Callable[[str, str], bool] = lambda _method, _path: True,
) -> Iterator[FaultProxy]:
    """Run a proxy on a free port of the loopback until the block ends; see `FaultProxy`."""
    if unknown := set(kinds) - KINDS:
        raise ValueError(f"no such kinds of fault: {sorted(unknown)}")
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

    def pass_on(self) -> None:
        body = _body(self)
        fault, chance = self.server.proxy.draw(self.command, self.path)
        if fault == "503":
            self.answer(503, [("Content-Type", "application/xml")], BUSY)
        elif fault == "stall":
            self.server.closing.wait()
            self.close_connection = True
        elif fault == "reset" and chance.random() < 0.5:
            _reset(self)
        else:
            self.answer_with(fault, chance, *_asked(self.server.upstream, self, body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815 (the names that the base class calls)

    def answer_with(
        self, fault: str, chance: random.Random, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        if fault == "reset" or (fault == "short" and not body):
            _reset(self)
        elif fault == "flip" and body:
            changed = bytearray(body)
            changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            self.answer(status, headers, bytes(changed))
        else:
            self.answer(status, headers, body, cut=fault == "short")

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
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
        except (OSError, http.client.HTTPException):  # the client has left, or the store has
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()


def _asked(upstream: str, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """The store's own answer: status, headers, body."""
    connection = http.client.HTTPConnection(upstream, timeout=60)
    try:
        # The host stays the proxy's: it is part of what a client signs.
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() not in OF_ONE_HOP:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        kept = OF_ONE_HOP - {"content-length"} if request.command == "HEAD" else OF_ONE_HOP
        told = [(name, value) for name, value in response.getheaders() if name.lower() not in kept]
        return response.status, told, response.read()
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
    """Let the client see "connection reset by peer": the socket is closed with nothing waited for."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True

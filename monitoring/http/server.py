"""A process's own small web server: `/metrics` for Prometheus, `/healthz`, and whatever else is mounted."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from mcl_dist.config import number
from mcl_dist.errors import ConfigError, UserError
from monitoring.http.basic_auth import BasicAuth

REQUEST_SECONDS = 30.0  # for whoever connects and then says nothing
ANYWHERE = ("", "0.0.0.0", "::")
LARGEST_PORT = 65535

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@dataclass(frozen=True)
class MonitoringConfig:
    """Where metrics are served, and to whom.

    Attributes:
        port: of the first rank of every machine; its other ranks take the ports that follow. None serves nothing.
        address: to bind to; the loopback unless a Prometheus elsewhere must reach it.
        tls_certificate, tls_key: PEM files; with them everything is HTTPS.
        password_file: users and their passwords' hashes, as `python -m monitoring.http.basic_auth` writes them; with it
            everything but `/healthz` asks for one.
        targets: file that tells Prometheus of all ranks; by default `targets.json` in the run folder.
        stale_seconds: without a step, after which `/healthz` answers 503.
        peak_tflops: what one device can do at most, in 10¹² operations a second; by default known from its name.
    """

    port: int | None = number(None, minimum=1, maximum=LARGEST_PORT)
    address: str = "127.0.0.1"
    tls_certificate: str | None = None
    tls_key: str | None = None
    password_file: str | None = None
    targets: str | None = None
    stale_seconds: float = number(600.0, minimum=1)
    peak_tflops: float | None = number(None, minimum=1e-3)

    def check(self) -> None:
        """What no field can check alone.

        Raises:
            ConfigError: one of certificate and key without the other.
        """
        if (self.tls_certificate is None) != (self.tls_key is None):
            given, missing = ("tls_key", "tls_certificate") if self.tls_key else ("tls_certificate", "tls_key")
            raise ConfigError(f"monitoring.{given}: found without monitoring.{missing}; give both")


class Exporter:
    """Answers requests in threads that end with the process.

    Args:
        registry: what `/metrics` shows.
        config: where, and to whom.
        offset: of the port from the configured one.
        option: what sets the port, for who has to set another.

    Attributes:
        port: that it listens on.

    Raises:
        UserError: the port is taken, or a certificate, key or password file cannot be used.
    """

    def __init__(
        self, registry: CollectorRegistry, config: MonitoringConfig, offset: int = 0, option: str = "monitoring.port"
    ) -> None:
        self.port = (config.port or 0) + offset
        self._passwords = None if config.password_file is None else BasicAuth.read(Path(config.password_file))
        self._mounted: dict[str, Application] = {"/metrics": make_wsgi_app(registry)}
        self._open: set[str] = set()
        where = f"{config.address}:{self.port}"
        if self.port > LARGEST_PORT:
            raise UserError(f"{where}: no such port; set {option} to a lower one")
        try:
            self._server = _Server(config.address, self.port, _tls(config))
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}; set {option} to another port") from error
        self._server.set_app(self._answer)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="exporter", daemon=True).start()

    def mount(self, prefix: str, application: Application, *, is_open: bool = False) -> None:
        """Let an application answer what lies at or below a path, whoever is mounted higher up; `is_open` to anyone."""
        self._mounted[prefix.rstrip("/")] = application
        if is_open:
            self._open.add(prefix.rstrip("/"))

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        found = [prefix for prefix in self._mounted if path == prefix or path.startswith(f"{prefix}/")]
        prefix = max(found, key=len, default=None)
        if prefix not in self._open and self._passwords and not self._passwords.admit(environ):
            headers = [("WWW-Authenticate", 'Basic realm="mcl"'), ("Content-Type", "text/plain")]
            start_response("401 Unauthorized", headers)
            return [b"user and password needed\n"]
        if prefix is None:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"nothing here; /metrics is what Prometheus wants\n"]
        return self._mounted[prefix](environ, start_response)


def reached_at(address: str) -> str:
    """What others call the machine that is bound to an address: its name where that is any address of its own."""
    return socket.gethostname() if address in ANYWHERE else address


def _tls(config: MonitoringConfig) -> ssl.SSLContext | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"monitoring.tls_certificate, tls_key: {config.tls_certificate}, {config.tls_key}: "
            f"{error.strerror or error}; both must be PEM files that belong together"
        ) from error
    return context


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """A line a scrape on the terminal would tell nobody anything."""


class _Server(ThreadingWSGIServer):
    """A thread a request; with TLS the handshake, too, is the thread's, so that nobody can hold up the others."""

    def __init__(self, address: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0][0]
        self._tls = tls
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """As its base, without asking a name server for the machine's full name, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one request, in its thread."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(REQUEST_SECONDS)
        with self._tls.wrap_socket(request.dup(), server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up, or spoke no TLS, knows it."""

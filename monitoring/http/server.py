"""HTTP server of a process: `/metrics` for Prometheus, `/healthz` and other mounted WSGI applications."""

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

REQUEST_SECONDS = 30.0  # timeout of a connection without a request
WILDCARD_ADDRESSES = ("", "0.0.0.0", "::")
LARGEST_PORT = 65535

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@dataclass(frozen=True)
class MonitoringConfig:
    """Address and access control of the metrics servers.

    Attributes:
        port: port of the first rank of each machine; its other ranks use the following ports. None serves nothing.
        address: bind address; the loopback unless Prometheus runs elsewhere.
        tls_certificate, tls_key: PEM files; with them the server uses HTTPS.
        password_file: users and password hashes, written by `python -m monitoring.http.basic_auth`; with it, every path
            except `/healthz` needs a password.
        targets: file that lists all ranks for Prometheus; default `targets.json` in the run folder.
        stale_seconds: time without a step after which `/healthz` answers 503.
        peak_tflops: peak of one device in TFLOP/s; by default looked up by the device's name.
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
        """Check settings that depend on each other.

        Raises:
            ConfigError: only one of certificate and key is set.
        """
        if (self.tls_certificate is None) != (self.tls_key is None):
            given, missing = ("tls_key", "tls_certificate") if self.tls_key else ("tls_certificate", "tls_key")
            raise ConfigError(f"monitoring.{given}: found without monitoring.{missing}; give both")


class MetricsServer:
    """Answers requests in daemon threads.

    Args:
        collectors: served at `/metrics`.
        config: address and access control.
        offset: added to the configured port.
        option: name of the port's option, for error messages.

    Attributes:
        port: listening port.

    Raises:
        UserError: the port is taken, or a certificate, key or password file cannot be used.
    """

    def __init__(
        self, collectors: CollectorRegistry, config: MonitoringConfig, offset: int = 0, option: str = "monitoring.port"
    ) -> None:
        self.port = (config.port or 0) + offset
        self._basic_auth = None if config.password_file is None else BasicAuth.read(Path(config.password_file))
        self._mounted: dict[str, Application] = {"/metrics": make_wsgi_app(collectors)}
        self._public: set[str] = set()
        address = f"{config.address}:{self.port}"
        if self.port > LARGEST_PORT:
            raise UserError(f"{address}: no such port; set {option} to a lower one")
        try:
            self._server = _Server(config.address, self.port, _tls(config))
        except OSError as error:
            raise UserError(f"{address}: {error.strerror or error}; set {option} to another port") from error
        self._server.set_app(self._answer)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="metrics-server", daemon=True).start()

    def mount(self, prefix: str, application: Application, *, is_public: bool = False) -> None:
        """Serve an application at and below a path; the longest prefix wins. A public one needs no password."""
        self._mounted[prefix.rstrip("/")] = application
        if is_public:
            self._public.add(prefix.rstrip("/"))

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        matching = [prefix for prefix in self._mounted if path == prefix or path.startswith(f"{prefix}/")]
        prefix = max(matching, key=len, default=None)
        if prefix not in self._public and self._basic_auth and not self._basic_auth.authenticate(environ):
            headers = [("WWW-Authenticate", 'Basic realm="mcl"'), ("Content-Type", "text/plain")]
            start_response("401 Unauthorized", headers)
            return [b"user and password required\n"]
        if prefix is None:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not found; metrics are at /metrics\n"]
        return self._mounted[prefix](environ, start_response)


def advertised_host(address: str) -> str:
    """Host under which other machines reach this bind address: the host name for a wildcard address."""
    return socket.gethostname() if address in WILDCARD_ADDRESSES else address


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
            f"{error.strerror or error}; give a PEM certificate and its key"
        ) from error
    return context


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


class _Server(ThreadingWSGIServer):
    """One thread per request; the TLS handshake runs in it, so a stalled client blocks no other."""

    def __init__(self, address: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.address_family = socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM)[0][0]
        self._tls = tls
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Bind as the base class does, but skip its slow DNS lookup of the machine's full name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer one request in its thread, after the TLS handshake if configured."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(REQUEST_SECONDS)
        with self._tls.wrap_socket(request.dup(), server_side=True) as tls_request:
            super().finish_request(tls_request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log: the client hung up or spoke no TLS, and knows it."""

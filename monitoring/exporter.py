"""Serves a registry to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server

from mcl_dist.config import number
from mcl_dist.errors import UserError


@dataclass(frozen=True)
class MonitoringConfig:
    """Where metrics are served.

    Attributes:
        port: of rank 0's `/metrics`; none serves nothing.
        address: to bind to; the loopback unless a Prometheus elsewhere must reach it.
    """

    port: int | None = number(None, minimum=1, maximum=65535)
    address: str = "127.0.0.1"


def serve(registry: CollectorRegistry, port: int, address: str) -> None:
    """Answer scrapes from a thread that ends with the process.

    Raises:
        UserError: when the port is taken.
    """
    try:
        start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        raise UserError(f"{address}:{port}: {error.strerror}; set monitoring.port to another port") from error

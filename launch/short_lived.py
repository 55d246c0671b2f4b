"""What a command that ends by itself shows to Prometheus while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector

from monitoring.board import Board
from monitoring.exporter import Exporter, MonitoringConfig


@contextmanager
def showing(board: Board, port: int | None) -> Iterator[None]:
    """Within, a board and the process are served on the loopback, where there is a port.

    Raises:
        UserError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(board)
    ProcessCollector(registry=registry)
    exporter = None if port is None else Exporter(registry, MonitoringConfig(port=port))
    try:
        yield
    finally:
        if exporter is not None:
            exporter.close()

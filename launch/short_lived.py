"""What a command that ends by itself shows to Prometheus while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector

from monitoring.board import Board
from monitoring.exporter import Exporter, MonitoringConfig


@contextmanager
def showing(board: Board, port: int | None) -> Iterator[int | None]:
    """Within, a board and the process are served on the loopback, where there is a port; 0 takes one that is free.

    Yields:
        The port.

    Raises:
        UserError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(board)
    ProcessCollector(registry=registry)
    exporter = None if port is None else Exporter(registry, MonitoringConfig(port=port))
    try:
        yield None if exporter is None else exporter.port
    finally:
        if exporter is not None:
            exporter.close()

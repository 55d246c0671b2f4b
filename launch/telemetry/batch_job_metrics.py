"""What a command that ends by itself shows to Prometheus: it answers while it runs, or pushes to a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector

from monitoring.http.pushgateway import Pushgateway
from monitoring.http.server import Exporter, MonitoringConfig
from monitoring.metrics.registry import Registry


@contextmanager
def showing(
    board: Registry,
    port: int | None,
    gateway: Pushgateway | None = None,
    count_failed_push: Callable[[], None] = lambda: None,
) -> Iterator[int | None]:
    """Within, a board and the process are served on the loopback, where there is a port; 0 takes one that is free.

    Args:
        board: what is shown.
        port: to answer at.
        gateway: to push to as well, at the end the last time.
        count_failed_push: is called for each push that fails.

    Yields:
        The port.

    Raises:
        UserError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(board)
    ProcessCollector(registry=registry)
    with ExitStack() as ends:
        exporter = None
        if port is not None:
            exporter = Exporter(registry, MonitoringConfig(port=port), option="--metrics-port")
            ends.callback(exporter.close)
        if gateway is not None:
            ends.enter_context(gateway.pushing(registry, count_failed_push))
        yield None if exporter is None else exporter.port

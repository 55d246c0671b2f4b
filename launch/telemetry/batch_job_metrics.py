"""Metrics of a command that ends by itself: served while it runs, and pushed to a Pushgateway."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector

from monitoring.http.pushgateway import Pushgateway
from monitoring.http.server import MetricsServer, MonitoringConfig
from monitoring.metrics.registry import Registry


@contextmanager
def serve_or_push(
    registry: Registry,
    port: int | None,
    pushgateway: Pushgateway | None = None,
    count_failed_push: Callable[[], None] = lambda: None,
) -> Iterator[int | None]:
    """Serve a registry and the process's own metrics on the loopback, and yield the port.

    Port 0 takes a free one, None serves nothing. A Pushgateway, if given, gets them periodically and once more at the
    end; `count_failed_push` is called for each failed push.

    Raises:
        UserError: the port is taken.
    """
    collectors = CollectorRegistry()
    collectors.register(registry)
    ProcessCollector(registry=collectors)
    with ExitStack() as stack:
        server = None
        if port is not None:
            server = MetricsServer(collectors, MonitoringConfig(port=port), option="--metrics-port")
            stack.callback(server.close)
        if pushgateway is not None:
            stack.enter_context(pushgateway.push_periodically(collectors, count_failed_push))
        yield None if server is None else server.port

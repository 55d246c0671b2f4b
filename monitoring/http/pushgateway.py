"""Metrics of a command that may end between two scrapes, pushed to a Pushgateway, where Prometheus finds them later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from urllib.error import HTTPError

from prometheus_client import CollectorRegistry, push_to_gateway

from monitoring.http.client import HttpClient

PUSH_SECONDS = 15.0  # between two pushes, as between two scrapes
REQUEST_SECONDS = 10.0  # for the gateway to answer; at its end a command waits for it twice at the most


class Pushgateway:
    """A Pushgateway, and the group of metrics there that is this command's.

    Args:
        client: of the gateway.
        job: label of the group.
        labels: its other labels.
        tell: is told in a line when pushing begins to fail, and at the end how often it has.
        seconds: between two pushes.
    """

    def __init__(
        self,
        client: HttpClient,
        job: str,
        labels: Mapping[str, str],
        tell: Callable[[str], None],
        seconds: float = PUSH_SECONDS,
    ) -> None:
        self._client = client
        self._job, self._labels = job, dict(labels)
        self._tell = tell
        self._seconds = seconds
        self._failed = 0
        self._fails = False

    @contextmanager
    def pushing(self, registry: CollectorRegistry, count_failure: Callable[[], None]) -> Iterator[None]:
        """Push now and then, and once more at the end; what cannot be pushed is told and counted, and fails nothing."""
        ended = threading.Event()

        def push_on() -> None:
            while not ended.wait(self._seconds):
                self._push(registry, count_failure)

        thread = threading.Thread(target=push_on, name="push", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._push(registry, count_failure)
            if self._failed:
                self._tell(f"{self._client.url}: {self._failed} pushes of metrics failed")

    def _push(self, registry: CollectorRegistry, count_failure: Callable[[], None]) -> None:
        try:
            push_to_gateway(
                self._client.url, self._job, registry, self._labels, timeout=REQUEST_SECONDS, handler=self._request
            )
        except (OSError, HTTPException) as error:
            self._failed += 1
            count_failure()
            if not self._fails:
                self._tell(f"{self._client.url}: metrics cannot be pushed ({_told(error)}); going on without")
            self._fails = True
        else:
            self._fails = False

    def _request(
        self, url: str, method: str, timeout: float, headers: Iterable[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        """What prometheus_client asks of a handler."""

        def send() -> None:
            self._client.open(url, timeout, method=method, data=data, headers=dict(headers)).close()

        return send


def _told(error: OSError | HTTPException) -> str:
    if isinstance(error, HTTPError):
        with error:
            return f"it answers {error.code} {error.reason}"
    return str(getattr(error, "reason", error))

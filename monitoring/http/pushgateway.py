"""Push the metrics of a batch job to a Pushgateway, which Prometheus scrapes; the job may end between two scrapes."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from urllib.error import HTTPError

from prometheus_client import CollectorRegistry, push_to_gateway

from monitoring.http.client import HttpClient

PUSH_SECONDS = 15.0  # push interval, equal to the scrape interval
REQUEST_SECONDS = 10.0  # request timeout; a job that ends waits for at most two requests


class Pushgateway:
    """One group of metrics on a Pushgateway.

    Args:
        client: HTTP client of the Pushgateway.
        job: job label of the group.
        labels: other labels of the group.
        log: receives one line when pushing starts to fail, and one with the number of failures at the end.
        seconds: push interval.
    """

    def __init__(
        self,
        client: HttpClient,
        job: str,
        labels: Mapping[str, str],
        log: Callable[[str], None],
        seconds: float = PUSH_SECONDS,
    ) -> None:
        self._client = client
        self._job, self._labels = job, dict(labels)
        self._log = log
        self._seconds = seconds
        self._failed = 0
        self._is_failing = False

    @contextmanager
    def push_periodically(self, collectors: CollectorRegistry, count_failure: Callable[[], None]) -> Iterator[None]:
        """Push at every interval inside the block and at its end; a failed push is logged and counted, not raised."""
        ended = threading.Event()

        def push_loop() -> None:
            while not ended.wait(self._seconds):
                self._push(collectors, count_failure)

        thread = threading.Thread(target=push_loop, name="push", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._push(collectors, count_failure)
            if self._failed:
                self._log(f"{self._client.url}: {self._failed} metrics pushes failed")

    def _push(self, collectors: CollectorRegistry, count_failure: Callable[[], None]) -> None:
        try:
            push_to_gateway(
                self._client.url, self._job, collectors, self._labels, timeout=REQUEST_SECONDS, handler=self._request
            )
        except (OSError, HTTPException) as error:
            self._failed += 1
            count_failure()
            if not self._is_failing:
                self._log(f"{self._client.url}: cannot push metrics ({_reason(error)}); continuing without")
            self._is_failing = True
        else:
            self._is_failing = False

    def _request(
        self, url: str, method: str, timeout: float, headers: Iterable[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        """Handler for prometheus_client."""

        def send() -> None:
            self._client.open(url, timeout, method=method, data=data, headers=dict(headers)).close()

        return send


def _reason(error: OSError | HTTPException) -> str:
    if isinstance(error, HTTPError):
        with error:
            return f"status {error.code} {error.reason}"
    return str(getattr(error, "reason", error))

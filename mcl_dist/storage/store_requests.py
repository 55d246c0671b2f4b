"""Requests to stores: each made once and with a time limit, and what their errors mean."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import count
from typing import Any, Literal

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

Failure = Literal["server_error", "reset", "stall", "short_body", "wrong_digest", "unreachable"]

FIRST_WAIT, LONGEST_WAIT = 0.05, 10.0  # seconds; doubled from one to the other, and drawn from the upper half
SLOWEST = 2**20  # bytes a second that a request may count on beyond its time limit
CHANCE = random.Random()  # not the generator that the whole process shares: requests are made whenever they are
BUSY = (408, 429)  # HTTP's "too slow" and "too many requests", which pass like the 500s
# Kinds of errors by their names, over all libraries of stores: none has to be installed to be known.
STALLS = frozenset(("TimeoutError", "FSTimeoutError", "ReadTimeoutError", "ConnectTimeoutError"))
RESETS = frozenset(("ConnectionResetError", "BrokenPipeError", "ServerDisconnectedError", "ConnectionClosedError"))
SHORT_BODIES = frozenset(("ClientPayloadError", "ContentLengthError", "IncompleteRead", "ResponseStreamingError"))
UNREACHABLE = frozenset(("ClientConnectorError", "EndpointConnectionError", "ConnectionRefusedError", "gaierror"))
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@|\?[^\s'\"]*")


def connected(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and its path there; the library of a store makes each request once."""
    filesystem, root = fsspec.core.url_to_fs(url, **_options(fsspec.utils.get_protocol(url)))
    if isinstance(filesystem, AsyncFileSystem):
        filesystem.retries = 1  # s3fs and gcsfs would try again by themselves
    return filesystem, root


def asked(filesystem: Any, method: str, *arguments: Any, seconds: float, **how: Any) -> Any:
    """Call a method of a filesystem; where it waits for a network it ends after so many seconds."""
    if not isinstance(filesystem, AsyncFileSystem):
        return getattr(filesystem, method)(*arguments, **how)
    return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=seconds, **how)


def waits() -> Iterator[float]:
    """Seconds to wait before the second try, the third and so on: longer and longer, and not for all alike."""
    for tries in count(1):
        yield min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * CHANCE.uniform(0.5, 1)


def failure(error: BaseException | None) -> Failure | None:
    """How an error came about; None when asking again will not help."""
    kinds = {kind.__name__ for one in chain(error) for kind in type(one).__mro__}
    if any(code >= 500 or code in BUSY for code in map(status, chain(error))):
        return "server_error"
    known: tuple[tuple[frozenset[str], Failure], ...] = (
        (RESETS, "reset"),
        (UNREACHABLE, "unreachable"),
        (STALLS, "stall"),
        (SHORT_BODIES, "short_body"),
    )
    return next((reason for names, reason in known if kinds & names), None)


def status(error: BaseException) -> int:
    """HTTP status that an error of aiohttp, botocore or gcsfs carries; 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return found if isinstance(found, int) else 0


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def without_credentials(text: str) -> str:
    """The text without what stands before an @ or after a ? in its URLs; what names local files alone stays."""
    return CREDENTIALS.sub("", text) if "://" in text else text


def _options(protocol: str) -> dict[str, Any]:
    """What keeps a protocol's library from repeating requests of its own accord."""
    if protocol in ("http", "https"):
        return {"get_client": _http_session, "client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    if protocol in ("s3", "s3a"):
        from mcl_dist.storage.s3_session import OneTrySession

        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "http_session_cls": OneTrySession}}
    return {}


async def _http_session(**options: Any) -> Any:
    import aiohttp

    session = aiohttp.ClientSession(**options)
    session._retry_connection = False  # it repeats a request whose connection was lost, and tells nobody
    return session

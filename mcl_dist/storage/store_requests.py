"""Single requests to stores: no hidden retries, a time limit each, and a classification of their errors."""

import random
import re
from collections.abc import Iterator
from itertools import count
from typing import Any, Literal

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

Failure = Literal["server_error", "reset", "stall", "short_body", "wrong_digest", "unreachable"]

FIRST_WAIT, LONGEST_WAIT = 0.05, 10.0  # seconds; doubled from one to the other, jittered within the upper half
SLOWEST = 2**20  # bytes a second: what a transfer may take beyond its time limit
JITTER = random.Random()  # not the process's shared generator, whose draws must not depend on requests
BUSY = (408, 429)  # HTTP's "request timeout" and "too many requests", as transient as the 500s
# Error types by name, over all store libraries: none of them has to be installed. The first match decides.
ERROR_TYPES: dict[Failure, set[str]] = {
    "reset": {"ConnectionResetError", "BrokenPipeError", "ServerDisconnectedError", "ConnectionClosedError"},
    "unreachable": {"ClientConnectorError", "EndpointConnectionError", "ConnectionRefusedError", "gaierror"},
    "stall": {"TimeoutError", "FSTimeoutError", "ReadTimeoutError", "ConnectTimeoutError"},
    "short_body": {"ClientPayloadError", "ContentLengthError", "IncompleteRead", "ResponseStreamingError"},
}
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@|\?[^\s'\"]*")


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, with the library's own retries disabled, and the path in it."""
    filesystem, root = fsspec.core.url_to_fs(url, **_options(fsspec.utils.get_protocol(url)))
    if isinstance(filesystem, AsyncFileSystem):
        filesystem.retries = 1  # s3fs and gcsfs retry by themselves
    return filesystem, root


def request(filesystem: Any, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """Call a filesystem's method; a call over a network fails after `seconds`."""
    if not isinstance(filesystem, AsyncFileSystem):
        return getattr(filesystem, method)(*arguments, **options)
    return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=seconds, **options)


def backoff() -> Iterator[float]:
    """Seconds to wait before each retry: exponential with jitter."""
    for tries in count(1):
        yield min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * JITTER.uniform(0.5, 1)


def classify_failure(error: BaseException | None) -> Failure | None:
    """The reason of a transient error; None for an error that a retry does not cure."""
    kinds = {kind.__name__ for cause in error_chain(error) for kind in type(cause).__mro__}
    if any(code >= 500 or code in BUSY for code in map(http_status, error_chain(error))):
        return "server_error"
    return next((reason for reason, names in ERROR_TYPES.items() if kinds & names), None)


def http_status(error: BaseException) -> int:
    """HTTP status of an error of aiohttp, botocore or gcsfs; 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return found if isinstance(found, int) else 0


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause or context, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def without_credentials(text: str) -> str:
    """The text without user names, passwords and query strings in its URLs; local paths are left as they are."""
    return CREDENTIALS.sub("", text) if "://" in text else text


def _options(protocol: str) -> dict[str, Any]:
    """Options that disable the retries of a protocol's library."""
    if protocol in ("http", "https"):
        return {"get_client": _http_session, "client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    if protocol in ("s3", "s3a"):
        from mcl_dist.storage.s3_session import NoRetrySession

        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "http_session_cls": NoRetrySession}}
    return {}


async def _http_session(**options: Any) -> Any:
    import aiohttp

    session = aiohttp.ClientSession(**options)
    session._retry_connection = False  # by default aiohttp repeats a request whose connection was lost
    return session

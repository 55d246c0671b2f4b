"""Single requests to a store: each with a time limit, none repeated unseen, errors by what they mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from dataloading.fetch_report import Failure
from mcl_dist.errors import UserError
from mcl_dist.storage import naming

BEYOND_ITS_END = 416
BUSY = (408, 429)  # HTTP's "too slow" and "too many requests", which pass like the 500s
# Kinds of errors by their names, over all libraries of stores: none has to be installed to be known.
STALLS = frozenset(("TimeoutError", "FSTimeoutError", "ReadTimeoutError", "ConnectTimeoutError"))
RESETS = frozenset(("ConnectionResetError", "BrokenPipeError", "ServerDisconnectedError", "ConnectionClosedError"))
SHORT_BODIES = frozenset(("ClientPayloadError", "ContentLengthError", "IncompleteRead", "ResponseStreamingError"))
UNREACHABLE = frozenset(("ClientConnectorError", "EndpointConnectionError", "ConnectionRefusedError", "gaierror"))
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@|\?[^\s'\"]*")


class RequestError(Exception):
    """A request that failed in a way that may pass: `reason` says how."""

    def __init__(self, reason: Failure, detail: str) -> None:
        super().__init__(f"{reason.replace('_', ' ')}: {detail}")
        self.reason = reason


class _BeyondItsEndError(Exception):
    """The file ends before the range begins."""


class MissingFileError(UserError):
    """The store answers, and has no such file."""


class Store:
    """Named files below one URL, read a range at a time.

    Its connections belong to one process: after a fork the child makes its own.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.url = without_credentials(self._url)
        self._owner = -1
        self._filesystem: Any = None
        self._root = ""

    def read(self, name: str, start: int, end: int, seconds: float) -> bytes:
        """Bytes `start` to `end` of a file, fewer when it ends before.

        Raises:
            RequestError: it did not work, and may the next time.
            MissingFileError: there is no such file.
            UserError: it will not work the next time either.
        """
        try:
            data: bytes = self._asked(name, start, end, seconds)
        except _BeyondItsEndError:
            return b""
        if len(data) > end - start:
            raise UserError(
                f"{self.url}/{name}: the server answers {len(data)} bytes where {end - start} were asked "
                "for; use one that knows HTTP ranges"
            )
        return data

    def _asked(self, name: str, start: int, end: int, seconds: float) -> bytes:
        where = f"{self.url}/{name}"
        try:
            with naming(where):
                filesystem = self._connected()
                path = f"{self._root}/{name}"
                if isinstance(filesystem, LocalFileSystem):
                    end = min(end, filesystem.size(path))  # room is made for all that is asked for
                if not isinstance(filesystem, AsyncFileSystem):
                    return bytes(filesystem.cat_file(path, start, end))
                return bytes(sync(filesystem.loop, filesystem._cat_file, path, start=start, end=end, timeout=seconds))
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                raise MissingFileError(without_credentials(str(error))) from None
            if BEYOND_ITS_END in map(_status, _chain(cause)):
                raise _BeyondItsEndError from None
            reason = _reason(cause)
            if reason is None:
                raise UserError(without_credentials(str(error))) from None
            raise RequestError(reason, without_credentials(str(error))) from None

    def _connected(self) -> Any:
        if self._owner != os.getpid():
            options = _options(fsspec.utils.get_protocol(self._url))
            self._filesystem, self._root = fsspec.core.url_to_fs(self._url, **options)
            self._filesystem.retries = 1  # s3fs and gcsfs would try again by themselves
            self._owner = os.getpid()
        return self._filesystem


def without_credentials(text: str) -> str:
    """The text without what stands before an @ or after a ? in its URLs."""
    return CREDENTIALS.sub("", text)


def _options(protocol: str) -> dict[str, Any]:
    """What keeps a protocol's library from repeating requests of its own accord."""
    if protocol in ("http", "https"):
        return {"get_client": _http_session, "client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    if protocol in ("s3", "s3a"):
        from dataloading.s3_session import OneTrySession

        return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "http_session_cls": OneTrySession}}
    return {}


async def _http_session(**options: Any) -> Any:
    import aiohttp

    session = aiohttp.ClientSession(**options)
    session._retry_connection = False  # it repeats a request whose connection was lost, and tells nobody
    return session


def _reason(error: BaseException | None) -> Failure | None:
    """How an error came about; None when asking again will not help."""
    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if any(status >= 500 or status in BUSY for status in map(_status, _chain(error))):
        return "server_error"
    known: tuple[tuple[frozenset[str], Failure], ...] = (
        (RESETS, "reset"),
        (UNREACHABLE, "unreachable"),
        (STALLS, "stall"),
        (SHORT_BODIES, "short_body"),
    )
    return next((reason for names, reason in known if kinds & names), None)


def _status(error: BaseException) -> int:
    """HTTP status that an error of aiohttp, botocore or gcsfs carries; 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return found if isinstance(found, int) else 0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

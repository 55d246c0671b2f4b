"""Single requests to a store: each with a time limit, none repeated unseen, errors by what they mean."""

from __future__ import annotations

import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mcl_dist.errors import UserError
from mcl_dist.storage.folder import naming
from mcl_dist.storage.store_requests import asked, chain, connected, status, without_credentials

BEYOND_ITS_END = 416


class _BeyondItsEndError(Exception):
    """The file ends before the range begins."""


class MissingFileError(UserError):
    """The store answers, and has no such file."""


class RangeReader:
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
            MissingFileError: there is no such file.
            UserError: it did not work; its cause says whether it may the next time.
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
                return bytes(asked(filesystem, "cat_file", path, start=start, end=end, seconds=seconds))
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                raise MissingFileError(without_credentials(str(error))) from None
            if BEYOND_ITS_END in map(status, chain(cause)):
                raise _BeyondItsEndError from None
            raise UserError(without_credentials(str(error))) from cause

    def _connected(self) -> Any:
        if self._owner != os.getpid():
            self._filesystem, self._root = connected(self._url)
            self._owner = os.getpid()
        return self._filesystem

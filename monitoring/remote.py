"""The view of a run that its first rank serves."""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from http.client import HTTPException
from pathlib import Path
from typing import cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from mcl_dist.errors import ConfigError, UserError
from monitoring.view import VERSION, View

SECONDS = 10.0
MOST_BYTES = 16 * 2**20


class RemoteRun:
    """A run at a URL.

    Args:
        url: of the run's first rank, `http(s)://host:port`.
        credentials: file that holds `user:password`, for no one else to read.
        certificates: PEM file of who is trusted to sign the server's certificate, where the system does not know it.

    Raises:
        ConfigError: the URL holds a password, or a file cannot be used.
    """

    def __init__(self, url: str, credentials: Path | None = None, certificates: Path | None = None) -> None:
        if urlsplit(url).username is not None:
            raise ConfigError("a URL with a password in it shows in process lists; give --credentials FILE instead")
        self._url = url.rstrip("/")
        self._headers = {} if credentials is None else {"Authorization": _basic(credentials)}
        try:
            context = ssl.create_default_context(cafile=certificates)
        except OSError as error:
            raise ConfigError(f"--ca: {certificates}: {error.strerror or error}; give a PEM file") from error
        self._opener = build_opener(_NoRedirect, HTTPSHandler(context=context))

    def view(self) -> View:
        """The run as its first rank tells it now.

        Raises:
            UserError: nobody answers, or not with a run's view.
        """
        request = Request(f"{self._url}/api/history", headers=self._headers)
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                view = json.loads(answer.read(MOST_BYTES))
        except HTTPError as error:
            with error:
                raise UserError(f"{self._url}: {_told(error)}") from error
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self._url}: {reason}; is the run on, and its monitoring.address reachable?") from error
        except ValueError:
            view = None
        if not isinstance(view, dict) or view.get("version") != VERSION:
            raise UserError(f"{self._url}: no run's view there; give the address of a run's first rank")
        return cast(View, view)


class _NoRedirect(HTTPRedirectHandler):
    """Credentials go where they were meant for, and nowhere else."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow none."""


def _told(error: HTTPError) -> str:
    match error.code:
        case 401 | 403:
            return "asks for a user and password, or these are wrong; give --credentials FILE with user:password"
        case 404:
            return "no run's view there; give the address of a run's first rank, not of another or of Prometheus"
        case 503:
            return "the run has written nothing yet"
    return f"answers {error.code} {error.reason}"


def _basic(file: Path) -> str:
    try:
        is_open_to_others = file.stat().st_mode & 0o077
        text = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--credentials: {file}: {error}") from error
    if is_open_to_others:
        raise ConfigError(f"--credentials: {file}: others may read it; chmod 600 it")
    if ":" not in text or "\n" in text:
        raise ConfigError(f"--credentials: {file}: must hold one line, user:password")
    return f"Basic {b64encode(text.encode()).decode()}"

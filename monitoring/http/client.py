"""Requests to one server, with a user's password that came from a file."""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from mcl_dist.errors import ConfigError


class HttpClient:
    """Follows no redirect: credentials go where they were meant for, and nowhere else.

    Args:
        url: of the server, `http(s)://host:port`, perhaps with a path.
        credentials: file that holds `user:password`, for no one else to read.
        certificates: PEM file of who is trusted to sign the server's certificate, where the system does not know it.
        option: what the command line's options for these two files begin with.

    Attributes:
        url: without a slash at its end.

    Raises:
        ConfigError: the URL is none or holds a password, or a file cannot be used.
    """

    def __init__(
        self, url: str, credentials: Path | None = None, certificates: Path | None = None, option: str = "--"
    ) -> None:
        parts = _split(url)
        if parts.username is not None:
            raise ConfigError(
                f"a URL with a password in it shows in process lists; give {option}credentials FILE instead"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise _no_url(url)
        self.url = url.rstrip("/")
        self._headers = {} if credentials is None else {"Authorization": _basic(credentials, f"{option}credentials")}
        try:
            context = ssl.create_default_context(cafile=certificates)
        except OSError as error:
            raise ConfigError(f"{option}ca: {certificates}: {error.strerror or error}; give a PEM file") from error
        self._opener = build_opener(_NoRedirect, HTTPSHandler(context=context))

    def open(
        self,
        url: str,
        seconds: float,
        *,
        method: str = "GET",
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer to a request, to be read and closed; errors as `urllib.request.urlopen`."""
        request = Request(url, data=data, method=method, headers={**(headers or {}), **self._headers})
        return self._opener.open(request, timeout=seconds)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow none."""


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise _no_url(url) from error


def _no_url(url: str) -> ConfigError:
    told = url.rpartition("@")[2]  # before it there may be a password
    return ConfigError(f"{told}: no URL; must be http://HOST:PORT or https://HOST:PORT")


def _basic(file: Path, option: str) -> str:
    try:
        is_open_to_others = file.stat().st_mode & 0o077
        text = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {file}: {error}") from error
    if is_open_to_others:
        raise ConfigError(f"{option}: {file}: others may read it; chmod 600 it")
    if ":" not in text or "\n" in text:
        raise ConfigError(f"{option}: {file}: must hold one line, user:password")
    return f"Basic {b64encode(text.encode()).decode()}"

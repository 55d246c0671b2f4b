"""HTTP client for one server, with credentials from a file."""

import ssl
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from mcl_dist.errors import ConfigError


class HttpClient:
    """Sends requests to one server and follows no redirects, so credentials reach only that server.

    Args:
        url: of the server, `http(s)://host:port`, optionally with a path.
        credentials: file with `user:password`, readable by its owner only.
        ca_file: PEM file of the CA that signed the server's certificate, if the system does not trust it.
        option: prefix of the command-line options for these two files, for error messages.

    Attributes:
        url: without a trailing slash.

    Raises:
        ConfigError: the URL is invalid or contains a password, or a file cannot be used.
    """

    def __init__(
        self, url: str, credentials: Path | None = None, ca_file: Path | None = None, option: str = "--"
    ) -> None:
        parts = _split(url)
        if parts.username is not None:
            raise ConfigError(f"a password in a URL is visible in process lists; use {option}credentials FILE instead")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise _invalid_url(url)
        self.url = url.rstrip("/")
        self._headers = {} if credentials is None else {"Authorization": _basic(credentials, f"{option}credentials")}
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"{option}ca: {ca_file}: {error.strerror or error}; give a PEM file") from error
        self._opener = build_opener(_NoRedirect, HTTPSHandler(context=context))

    def open(
        self,
        url: str,
        timeout: float,
        *,
        method: str = "GET",
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request and return the open response; raises what `urllib.request.urlopen` raises."""
        request = Request(url, data=data, method=method, headers={**(headers or {}), **self._headers})
        return self._opener.open(request, timeout=timeout)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """Return no request, so that the redirect is an error."""


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise _invalid_url(url) from error


def _invalid_url(url: str) -> ConfigError:
    without_password = url.rpartition("@")[2]
    return ConfigError(f"{without_password}: not a valid URL; must be http://HOST:PORT or https://HOST:PORT")


def _basic(file: Path, option: str) -> str:
    try:
        is_readable_by_others = file.stat().st_mode & 0o077
        text = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {file}: {error}") from error
    if is_readable_by_others:
        raise ConfigError(f"{option}: {file}: readable by other users; run chmod 600 {file}")
    if ":" not in text or "\n" in text:
        raise ConfigError(f"{option}: {file}: must hold one line, user:password")
    return f"Basic {b64encode(text.encode()).decode()}"

"""The view of a run that its first rank serves."""

from __future__ import annotations

import json
from http.client import HTTPException
from pathlib import Path
from typing import cast
from urllib.error import HTTPError, URLError

from mcl_dist.errors import UserError
from monitoring.history.run_view import VERSION, RunView
from monitoring.http.client import HttpClient

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
        self._client = HttpClient(url, credentials, certificates)

    def view(self) -> RunView:
        """The run as its first rank tells it now.

        Raises:
            UserError: nobody answers, or not with a run's view.
        """
        url = self._client.url
        try:
            with self._client.open(f"{url}/api/history", SECONDS) as answer:
                view = json.loads(answer.read(MOST_BYTES))
        except HTTPError as error:
            with error:
                raise UserError(f"{url}: {_told(error)}") from error
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{url}: {reason}; is the run on, and its monitoring.address reachable?") from error
        except ValueError:
            view = None
        if not isinstance(view, dict) or view.get("version") != VERSION:
            raise UserError(f"{url}: no run's view there; give the address of a run's first rank")
        return cast(RunView, view)


def _told(error: HTTPError) -> str:
    match error.code:
        case 401 | 403:
            return "asks for a user and password, or these are wrong; give --credentials FILE with user:password"
        case 404:
            return "no run's view there; give the address of a run's first rank, not of another or of Prometheus"
        case 503:
            return "the run has written nothing yet"
    return f"answers {error.code} {error.reason}"

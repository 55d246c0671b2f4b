"""The view of a run, fetched from the first rank's server."""

import json
from http.client import HTTPException
from pathlib import Path
from typing import cast
from urllib.error import HTTPError, URLError

from mcl_dist.errors import UserError
from monitoring.history.run_view import VERSION, RunView
from monitoring.http.client import HttpClient

TIMEOUT_SECONDS = 10.0
MAX_BYTES = 16 * 2**20


class RemoteRun:
    """A run whose first rank serves its view.

    Args:
        url: of the run's first rank, `http(s)://host:port`.
        credentials: file with `user:password`, readable by its owner only.
        ca_file: PEM file of the CA that signed the server's certificate, if the system does not trust it.

    Raises:
        ConfigError: the URL is invalid or contains a password, or a file cannot be used.
    """

    def __init__(self, url: str, credentials: Path | None = None, ca_file: Path | None = None) -> None:
        self._client = HttpClient(url, credentials, ca_file)

    def view(self) -> RunView:
        """The run's current view.

        Raises:
            UserError: the server does not answer, or its answer is not a run's view.
        """
        url = self._client.url
        try:
            with self._client.open(f"{url}/api/history", TIMEOUT_SECONDS) as answer:
                view = json.loads(answer.read(MAX_BYTES))
        except HTTPError as error:
            with error:
                raise UserError(f"{url}: {_reason(error)}") from error
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{url}: {reason}; is the run active, and its monitoring.address reachable?") from error
        except ValueError:
            view = None
        if not isinstance(view, dict) or view.get("version") != VERSION:
            raise UserError(f"{url}: the answer is not a run's view; give the address of a run's first rank")
        return cast(RunView, view)


def _reason(error: HTTPError) -> str:
    match error.code:
        case 401 | 403:
            return "asks for a user and password, or they are wrong; give --credentials FILE with user:password"
        case 404:
            return "serves no run's view; give the address of a run's first rank, not of another rank or of Prometheus"
        case 503:
            return "the run has written nothing yet"
    return f"answered {error.code} {error.reason}"

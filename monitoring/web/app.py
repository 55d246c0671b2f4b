"""Answers a browser with a run's page, and the page with the run's view."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mcl_dist.errors import UserError
from monitoring.history.run_view import RunView

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
}
HISTORY = "/api/history"
HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]


class Page:
    """A WSGI application: `/` is the page of the run that `look` shows, `/api/history` its view as JSON."""

    def __init__(self, look: Callable[[], RunView]) -> None:
        self._look = look
        self._lock = threading.Lock()  # a server answers in threads
        folder = Path(__file__).parent
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a GET; anything else is refused."""
        path = environ.get("PATH_INFO", "") or "/"
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, body, kind = "405 Method Not Allowed", b"this page is only to be looked at\n", "text/plain"
        elif path == HISTORY:
            status, body, kind = self._history()
        elif path in self._files:
            status, (body, kind) = "200 OK", self._files[path]
        else:
            status, body, kind = "404 Not Found", b"nothing here; the run's page is at /\n", "text/plain"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *HEADERS])
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def _history(self) -> tuple[str, bytes, str]:
        try:
            with self._lock:
                return "200 OK", json.dumps(self._look(), allow_nan=False).encode(), "application/json"
        except UserError as error:
            return "503 Service Unavailable", f"{error}\n".encode(), "text/plain; charset=utf-8"

"""WSGI application that serves the web page of a run and its data."""

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


class RunApp:
    """Serves the page of a run at `/` and its view, read by `read_view` for each request, as JSON at `/api/history`."""

    def __init__(self, read_view: Callable[[], RunView]) -> None:
        self._read_view = read_view
        self._lock = threading.Lock()  # requests arrive in several threads
        folder = Path(__file__).parent
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer GET and HEAD requests; reject other methods."""
        path = environ.get("PATH_INFO", "") or "/"
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, body, kind = "405 Method Not Allowed", b"only GET and HEAD are allowed\n", "text/plain"
        elif path == HISTORY:
            status, body, kind = self._history()
        elif path in self._files:
            status, (body, kind) = "200 OK", self._files[path]
        else:
            status, body, kind = "404 Not Found", b"not found; the page of the run is at /\n", "text/plain"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *HEADERS])
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def _history(self) -> tuple[str, bytes, str]:
        try:
            with self._lock:
                return "200 OK", json.dumps(self._read_view(), allow_nan=False).encode(), "application/json"
        except UserError as error:
            return "503 Service Unavailable", f"{error}\n".encode(), "text/plain; charset=utf-8"

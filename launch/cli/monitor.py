"""`mcl monitor`: show a run on the terminal, as JSON, or as a web page."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.command import Commands, add_command
from mcl_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    from monitoring.history.run_view import RunView

EXAMPLE = """\
example:
  mcl monitor runs/first
  mcl monitor runs/first --json | jq .step
  mcl monitor https://node1:9400 --credentials ~/.mcl-credentials --ca ca.pem"""
INTERVAL = 2.0
REDRAW_SECONDS = 0.25  # between redraws, which update the ages and follow the terminal's size


def register(commands: Commands) -> None:
    """Add `mcl monitor`."""
    parser = add_command(
        commands,
        "monitor",
        run,
        help="watch a run",
        description="Show a run live on the terminal, during the run and after it; as plain text, once, if the output "
        "is not a terminal. Ctrl-C exits; the run continues.",
        example=EXAMPLE,
    )
    parser.add_argument("source", metavar="RUN", help="run folder (run.dir), or URL of the run's rank 0")
    parser.add_argument("--credentials", metavar="FILE", type=Path, help="file with user:password, for a URL")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="PEM file of the CA of the URL's certificate")
    parser.add_argument("--once", action="store_true", help="print the current state and exit")
    parser.add_argument("--json", action="store_true", help="print the current state as JSON and exit")
    parser.add_argument("--interval", metavar="S", type=float, default=INTERVAL, help="seconds between updates (2)")
    parser.add_argument("--serve", metavar="PORT", type=int, help="serve the run as a web page on the loopback")


def run(args: argparse.Namespace) -> int:
    """Show the run; raises UserError if it cannot be read, ConfigError for a bad interval or option."""
    if not args.interval > 0:
        raise ConfigError(f"--interval: found {args.interval}, must be more than 0")
    read_view = view_reader(args)
    if args.serve is not None:
        _serve(read_view, args.serve)
    elif args.json:
        print(json.dumps(read_view(), allow_nan=False))
    elif args.once or not sys.stdout.isatty():
        _print(read_view())
    else:
        _watch(read_view, args.interval)
    return 0


def view_reader(args: argparse.Namespace) -> Callable[[], RunView]:
    """A function that reads the current view of the run from its folder or URL."""
    from monitoring.history.remote_run import RemoteRun
    from monitoring.history.run_folder import RunFolder

    if args.source.startswith(("http://", "https://")):
        return RemoteRun(args.source, args.credentials, args.ca).view
    if args.credentials or args.ca:
        raise ConfigError("--credentials and --ca need a URL; omit them for a run folder")
    return RunFolder(Path(args.source)).view


def _serve(read_view: Callable[[], RunView], port: int) -> None:
    """Serve the web page on the loopback until Ctrl-C."""
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    from monitoring.web.app import RunApp

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Do not log requests: the page sends one every few seconds."""

    read_view()  # reports a missing run before the server starts
    try:
        server = make_server("127.0.0.1", port, RunApp(read_view), handler_class=Quiet)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve: 127.0.0.1:{port}: {error}; give another port") from error
    with server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


def _print(view: RunView) -> None:
    from rich.console import Console

    from launch.terminal.monitor_screen import MonitorScreen

    Console(highlight=False).print(MonitorScreen(view))


def _watch(read_view: Callable[[], RunView], interval: float) -> None:
    """Fill the terminal until Ctrl-C; while the run cannot be read, keep the last view and show the error."""
    from rich.console import Console
    from rich.live import Live

    from launch.terminal.monitor_screen import MonitorScreen

    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)  # a shell may export them; they would hide changes of the terminal's size
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM restores the terminal too
    view, error, last_read = read_view(), "", time.monotonic()
    try:
        screen = MonitorScreen(view, fit_height=True)
        with Live(screen, console=Console(highlight=False), screen=True, auto_refresh=False) as live:
            while True:
                if time.monotonic() - last_read >= interval:
                    try:
                        view, error = read_view(), ""
                    except UserError as caught:
                        error = str(caught)
                    last_read = time.monotonic()
                live.update(MonitorScreen({**view, "now": time.time()}, error, fit_height=True), refresh=True)
                time.sleep(min(interval, REDRAW_SECONDS))
    except KeyboardInterrupt:
        _print(view)

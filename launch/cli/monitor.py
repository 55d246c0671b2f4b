"""`mcl monitor`."""

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

from mcl_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    from monitoring.history.run_view import RunView

EXAMPLE = """\
example:
  mcl monitor runs/first
  mcl monitor runs/first --json | jq .step
  mcl monitor https://node1:9400 --credentials ~/.mcl-credentials --ca ca.pem"""
INTERVAL = 2.0
REDRAW_SECONDS = 0.25  # between looks at the clock and at the terminal's size


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl monitor`."""
    parser = commands.add_parser(
        "monitor",
        help="watch a run",
        description="Show a run on the terminal, live, while it runs and after; once and as plain text where the "
        "output is no terminal. Ctrl-C leaves; the run goes on.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", help="run folder (run.dir), or URL of a run's first rank")
    parser.add_argument("--credentials", metavar="FILE", type=Path, help="file with user:password, for a URL")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="PEM file of who signed the URL's certificate")
    parser.add_argument("--once", action="store_true", help="print the run as it is now, and leave")
    parser.add_argument("--json", action="store_true", help="print the run as it is now as JSON, and leave")
    parser.add_argument("--interval", metavar="S", type=float, default=INTERVAL, help="seconds between looks (2)")
    parser.add_argument("--serve", metavar="PORT", type=int, help="serve the run as a page on this machine's loopback")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the run; errors as those of its source, and for an interval that is none."""
    if not args.interval > 0:
        raise ConfigError(f"--interval: found {args.interval}, must be more than 0")
    look = source(args)
    if args.serve is not None:
        _serve(look, args.serve)
    elif args.json:
        print(json.dumps(look(), allow_nan=False))
    elif args.once or not sys.stdout.isatty():
        _print(look())
    else:
        _watch(look, args.interval)
    return 0


def source(args: argparse.Namespace) -> Callable[[], RunView]:
    """Where the run's figures come from: asked again, it has newer ones."""
    from monitoring.history.remote_run import RemoteRun
    from monitoring.history.run_folder import RunFolder

    if args.source.startswith(("http://", "https://")):
        return RemoteRun(args.source, args.credentials, args.ca).view
    if args.credentials or args.ca:
        raise ConfigError("--credentials and --ca are for a run at a URL; leave them out for a run folder")
    return RunFolder(Path(args.source)).view


def _serve(look: Callable[[], RunView], port: int) -> None:
    """Answer browsers of this machine until Ctrl-C."""
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    from monitoring.web.app import Page

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Requests of a page that looks every few seconds are no news."""

    look()  # so that a run that is not there is told now
    try:
        server = make_server("127.0.0.1", port, Page(look), handler_class=Quiet)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve: 127.0.0.1:{port}: {error}; give another port") from error
    with server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


def _print(view: RunView) -> None:
    from rich.console import Console

    from launch.terminal.monitor_screen import Screen

    Console(highlight=False).print(Screen(view))


def _watch(look: Callable[[], RunView], interval: float) -> None:
    """Fill the terminal until Ctrl-C, with the view of before while there is no newer one."""
    from rich.console import Console
    from rich.live import Live

    from launch.terminal.monitor_screen import Screen

    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)  # the size that the terminal once had, where a shell exports it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the terminal is given back then, too
    view, trouble, looked = look(), "", time.monotonic()
    try:
        with Live(Screen(view, fits=True), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
            while True:
                if time.monotonic() - looked >= interval:
                    try:
                        view, trouble = look(), ""
                    except UserError as error:
                        trouble = str(error)
                    looked = time.monotonic()
                live.update(Screen({**view, "now": time.time()}, trouble, fits=True), refresh=True)
                time.sleep(min(interval, REDRAW_SECONDS))
    except KeyboardInterrupt:
        _print(view)

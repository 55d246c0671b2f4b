"""`mcl report`: all that a run has to show, as one page in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.settings import PretrainConfig

FILE = "report.html"
EXAMPLE = """\
example:
  mcl report runs/first
  mcl report runs/first --out report.html --videos 5 --cache /scratch/mcl"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl report`."""
    parser = commands.add_parser(
        "report",
        help="write a run's report as one page",
        description="Write one HTML file, whole in itself: configuration, curves, evaluations beside published ones, "
        "tubelets, where the alignment map looks at each checkpoint, nearest neighbours. Works while the run runs and "
        "after; what has no source yet says so on the page.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder (run.dir)")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"page to write (default: {FILE} in RUN)")
    parser.add_argument("--videos", type=int, default=3, help="training videos whose tubelets are shown, at most (3)")
    parser.add_argument(
        "--cache", metavar="DIR", help="folder for what is kept of sets that are elsewhere (default: the run's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path.

    Raises:
        UserError: there is no run, or the page cannot be written.
        ConfigError: a number out of range.
    """
    from mcl_dist.errors import ConfigError

    if args.videos < 1:
        raise ConfigError(f"--videos: found {args.videos}, must be at least 1")
    print(write_report(args.run_folder, args.out, args.videos, args.cache))
    return 0


def write_report(folder: Path, out: Path | None = None, num_videos: int = 3, cache: str | None = None) -> Path:
    """Write a run's report, by default into its folder; returns where.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    from launch.report_page import report
    from mcl_dist.storage import Folder

    page = report(folder, num_videos, cache)
    out = out or folder / FILE
    Folder(str(out.parent)).write(out.name, page.encode())
    return out


def report_at_the_end(config: PretrainConfig) -> None:
    """The report of a run that is done, by its first rank; the run counts as done whatever becomes of it."""
    try:
        print(f"report written to {write_report(Path(config.run.dir))}", flush=True)
    except Exception as error:  # a page is not worth a finished run
        print(f"mcl: no report written ({type(error).__name__}: {error}); `mcl report {config.run.dir}`", flush=True)

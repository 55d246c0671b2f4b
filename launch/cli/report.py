"""`mcl report`: all that a run has to show, as one page in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.report.run_report import FILE

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
    parser.add_argument("--out", metavar="FILE", help=f"path or URL of the page (default: {FILE} in RUN)")
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
    from launch.report.run_report import write_report
    from mcl_dist.errors import ConfigError

    if args.videos < 1:
        raise ConfigError(f"--videos: found {args.videos}, must be at least 1")
    print(write_report(args.run_folder, args.out, args.videos, args.cache))
    return 0

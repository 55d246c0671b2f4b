"""`mcl report`: write the report of a run as one HTML page."""

import argparse
from pathlib import Path

from launch.cli.command import Commands, add_command, check_minimums
from launch.report.run_report import REPORT_FILE, write_report

EXAMPLE = """\
example:
  mcl report runs/first
  mcl report runs/first --out report.html --videos 5 --cache /scratch/mcl"""


def register(commands: Commands) -> None:
    """Add `mcl report`."""
    parser = add_command(
        commands,
        "report",
        run,
        help="write a run's report as one page",
        description="Write one self-contained HTML file: configuration, learning curves, evaluations beside published "
        "results, tubelets, alignment maps of each checkpoint, nearest neighbours. Works during the run and after "
        "it; a section without data states the reason.",
        example=EXAMPLE,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder (run.dir)")
    parser.add_argument("--out", metavar="FILE", help=f"path or URL of the page (default: {REPORT_FILE} in RUN)")
    parser.add_argument("--videos", type=int, default=3, help="largest number of videos with tubelets (3)")
    parser.add_argument(
        "--cache", metavar="DIR", help="local cache for indices of remote shard sets (default: the run's)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path; raises as `write_report`, and ConfigError if --videos is less than 1."""
    check_minimums(args, {"videos": 1})
    print(write_report(args.run_folder, args.out, args.videos, args.cache))
    return 0

"""`mcl report`: all that a run has to show, as one page in its folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FILE = "report.html"
AT_MOST_SECONDS = 900.0  # that a run's end waits for its report
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
    from mcl_dist.errors import ConfigError

    if args.videos < 1:
        raise ConfigError(f"--videos: found {args.videos}, must be at least 1")
    print(write_report(args.run_folder, args.out, args.videos, args.cache))
    return 0


def write_report(folder: Path, out: str | None = None, num_videos: int = 3, cache: str | None = None) -> str:
    """Write a run's report, by default into its folder; returns where.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    from launch.report.run_page import report
    from mcl_dist.storage.folder import write_file

    page = report(folder, num_videos, cache)
    out = out or str(folder / FILE)
    write_file(out, page.encode())
    return out


def report_at_the_end(folder: str) -> None:
    """The report of a run that is done, by its first rank; the run counts as done whatever becomes of it.

    In a process of its own: in a rank's, once the others had left, files that it read were seen closed under it.
    """
    command = [sys.executable, "-m", "mcl_dist", "report", folder]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=AT_MOST_SECONDS, check=False
        )
        said = (
            (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1] if result.returncode else ""
        )
    except subprocess.TimeoutExpired:
        said = f"not done after {AT_MOST_SECONDS:.0f} s"
    told = f"no report written ({said}); `mcl report {folder}` tries again" if said else f"report: {folder}/{FILE}"
    print(told, flush=True)

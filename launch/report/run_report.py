"""The report of a run, written by `mcl report` at any time and by the first rank at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FILE = "report.html"
AT_MOST_SECONDS = 900.0  # that the end of a run waits for its report


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

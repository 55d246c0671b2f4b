"""Write the report of a run: by `mcl report` at any time, and by rank 0 at the end of the run."""

import subprocess
import sys
from pathlib import Path

REPORT_FILE = "report.html"
TIMEOUT_SECONDS = 900.0  # for the report at the end of a run


def write_report(folder: Path, out: str | None = None, num_videos: int = 3, cache: str | None = None) -> str:
    """Write the report of a run, by default into its folder, and return its path.

    Raises UserError if there is no run in the folder, or if the page cannot be written.
    """
    from launch.report.run_page import run_page
    from mcl_dist.storage.folder import write_file

    out = out or str(folder / REPORT_FILE)
    write_file(out, run_page(folder, num_videos, cache).encode())
    return out


def write_final_report(folder: str) -> None:
    """Write the report of a finished run on rank 0; a failure is printed and does not fail the run.

    It runs in a separate process: inside a rank, files that the report read were observed to be closed by other code
    once the other ranks had exited.
    """
    command = [sys.executable, "-m", "mcl_dist", "report", folder]
    failure = ""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        if result.returncode:
            failure = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        failure = f"not finished after {TIMEOUT_SECONDS:.0f} s"
    success = f"report: {folder}/{REPORT_FILE}"
    print(f"no report written ({failure}); run `mcl report {folder}` to retry" if failure else success, flush=True)

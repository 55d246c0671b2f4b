"""A rank exits when its launcher is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.supervision.deepspeed_launcher import RUNTIME
from launch.supervision.polling import wait_until
from launch.supervision.processes import ProcessEntry

SECONDS = 20.0
LAUNCHER = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
signal.pause()
"""
RANK = """
import os, signal, sys
from pathlib import Path
from launch.supervision.parent_watch import stop_with_parent
from launch.supervision.polling import wait_until
from mcl_dist.distributed.shutdown import StopRequest
folder, stop = Path(sys.argv[1]), StopRequest()
stop_with_parent(stop, seconds=float(sys.argv[2]))
(folder / "new").write_text(str(os.getpid()))
(folder / "new").rename(folder / "pid")
"""
SAVE = 'wait_until(lambda: stop.is_requested, 20); (folder / "saved").write_text(stop.reason)'
IGNORE = "signal.pause()"


def leave_without_launcher(folder: Path, program: str, seconds: float) -> None:
    """Kill a rank's launcher, and wait until the rank has exited."""
    command = [sys.executable, "-c", LAUNCHER, RANK + program, str(folder), str(seconds)]
    launcher = subprocess.Popen(command, env={**os.environ, RUNTIME: str(folder)})
    try:
        assert wait_until((folder / "pid").exists, SECONDS)
    finally:
        launcher.kill()
        launcher.wait()
    rank = ProcessEntry(int((folder / "pid").read_text()))
    assert wait_until(lambda: rank.is_dead, SECONDS)


def test_a_rank_whose_launcher_is_gone_is_asked_to_stop(tmp_path: Path) -> None:
    leave_without_launcher(tmp_path, SAVE, seconds=SECONDS)
    assert (tmp_path / "saved").read_text() == "launcher gone"


def test_a_rank_that_does_not_stop_after_its_launcher_is_ended(tmp_path: Path) -> None:
    leave_without_launcher(tmp_path, IGNORE, seconds=0)

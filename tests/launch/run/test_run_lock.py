"""One run at a time in a run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.run.run_lock import hold_run_lock
from mcl_dist.errors import UserError

HOLDER = """
import sys
from pathlib import Path
from launch.run.run_lock import hold_run_lock
with hold_run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with (
        hold_run_lock(tmp_path / "run"),
        pytest.raises(UserError) as raised,
        hold_run_lock(tmp_path / "run", seconds=0),
    ):
        pytest.fail("two runs hold the lock")
    assert str(raised.value) == (
        f"{tmp_path}/run: another run is training there; end it first, or choose another run.dir"
    )


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError), hold_run_lock(tmp_path, seconds=0):
            pytest.fail("two runs hold the lock")
        holder.kill()
    with hold_run_lock(tmp_path, seconds=0):
        pass

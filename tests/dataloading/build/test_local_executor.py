from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dataloading.build.local_executor import ordered_map
from mcl_dist.errors import UserError

INTERRUPTED = """
    import time
    from dataloading.build.local_executor import raise_if_cancelled, ordered_map

    def task(number):
        print("working", flush=True)
        while True:
            raise_if_cancelled()
            time.sleep(0.01)

    if __name__ == "__main__":
        with ordered_map(task, range(9), 2) as results:
            list(results)
"""


def test_results_are_in_the_order_of_their_tasks() -> None:
    with ordered_map(str, range(7), 2) as results:
        assert list(results) == ["0", "1", "2", "3", "4", "5", "6"]


def test_a_single_worker_is_this_process() -> None:
    with ordered_map(lambda _: os.getpid(), range(2), 1) as results:
        assert list(results) == [os.getpid()] * 2


def test_a_dead_worker_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match="a worker process died"), ordered_map(os._exit, [3], 2) as results:
        list(results)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, number: int) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for _ in range(2):
        parent.stdout.readline()
    parent.send_signal(number)
    # Every worker holds the pipe open, so reading to its end waits for the last one to exit.
    parent.communicate(timeout=30)
    assert parent.returncode

"""Starts gloo ranks for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

RANK_SECONDS = 240


def run_gloo_ranks(file: str, function: str, count: int, *arguments: object) -> None:
    """Run `function` of a test file in `count` processes of one process group; fail with the output of a failed one.

    As a program, the test file must call the function named by its first argument with the other arguments.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # a test file run as a program cannot import its neighbours otherwise
        "WORLD_SIZE": str(count),
        "LOCAL_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, file, function, *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = []
    try:
        outputs = [rank.communicate(timeout=RANK_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            with rank:  # reaps the process and closes its output, also after a timeout
                rank.kill()
    failed = [output for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, failed[0]

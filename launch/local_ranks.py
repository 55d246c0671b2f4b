"""Ranks on this machine: started by the DeepSpeed launcher, each ended without tearing DeepSpeed down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from mcl_dist.errors import EXIT_FAILURE, RankError, UserError

LOST_RANK = "gloo/transport"  # where gloo's error comes from when a connection is closed, reset or broken


def launch_ranks(script: str, words: Sequence[str], num_ranks: int) -> int:
    """Run a script once a rank, with these words on its command line; returns the launcher's exit code."""
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    command += ["--num_gpus", str(num_ranks), "--master_port", str(free_port()), str(Path(script).resolve())]
    return subprocess.run([*command, *words], env=environment, check=False).returncode


def as_rank(work: Callable[[], None]) -> NoReturn:
    """Do this rank's work and end: with 0, or with an error's exit code after one line of one rank."""
    try:
        work()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"mcl: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except RuntimeError as error:
        if LOST_RANK not in str(error):
            raise
        print("mcl: a rank has gone, and with it this run; the line of that rank says why", file=sys.stderr)
        _leave(EXIT_FAILURE)
    except KeyboardInterrupt:
        _leave(EXIT_FAILURE)
    _leave(0)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _leave(code: int) -> NoReturn:
    """End this rank at once: tearing down DeepSpeed's process groups aborts about one run in twenty."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

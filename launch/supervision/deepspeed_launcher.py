"""Ranks on this machine: started by the DeepSpeed launcher, each ended without tearing DeepSpeed down."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.supervision.outcome import CRASHED, DONE, LOST, STOPPED, USER, Outcome
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED, RankError, UserError
from mcl_dist.run_log.goodput import StartInfo

RUNTIME = "MCL_RUNTIME"  # names the folder of the node's supervisor, in the environment of its ranks
RESTARTED = "MCL_RESTARTED"  # says as JSON why this attempt had to be made
STOP_FILE = "stop"  # in the run's folder or the supervisor's, a request to stop
LOST_RANK = "gloo/transport"  # where gloo's error comes from when a connection is closed, reset or broken
LOST_LINE = "a rank has gone, and with it this run; the line of that rank says why"


@dataclass(frozen=True)
class NodeSpec:
    """Where the ranks of all nodes meet, and which of them are on this node.

    Attributes:
        num_ranks: on each node.
        nodes: number of nodes.
        node: this one's, from 0.
        address, port: of the first node.
    """

    num_ranks: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def launcher_command(script: str, words: Sequence[str], meeting: NodeSpec) -> list[str]:
    """What runs a script once a rank of this node, with these words on its command line."""
    world = json.dumps({f"node{node}": _devices(meeting.num_ranks) for node in range(meeting.nodes)})
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--log_level", "critical"]
    command += ["--world_info", base64.urlsafe_b64encode(world.encode()).decode(), "--node_rank", str(meeting.node)]
    command += ["--master_addr", meeting.address, "--master_port", str(meeting.port or free_port())]
    return [*command, str(Path(script).resolve()), *words]


def _devices(num_ranks: int) -> list[str]:
    """What DeepSpeed's launcher is to make of CUDA_VISIBLE_DEVICES, an entry a rank; -1 shows a rank no GPU.

    It overwrites the variable, so GPUs that somebody has hidden by it would be back in the ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return ["-1"] * num_ranks
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:num_ranks]
    return chosen if len(chosen) == num_ranks and all(chosen) else [str(rank) for rank in range(num_ranks)]


def launcher_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the launcher, which its ranks inherit."""
    import torch

    environment = {**os.environ, **(more or {})}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def launch_ranks(script: str, words: Sequence[str], num_ranks: int) -> int:
    """Run a script once a rank, with these words on its command line; returns the launcher's exit code."""
    command = launcher_command(script, words, NodeSpec(num_ranks))
    return subprocess.run(command, env=launcher_environment(), check=False).returncode


def watched_rank() -> tuple[StopRequest, Heartbeat]:
    """What asks this rank to stop, and its sign of life, from now on; to be called before anything that takes long."""
    stop = StopRequest()
    stop.heed_signals()
    folder = os.environ.get(RUNTIME)
    heartbeat = Heartbeat(Path(folder) if folder else None, int(os.environ.get("RANK", "0")))
    heartbeat.start()
    return stop, heartbeat


def heed_stop_file(folder: Path, stop: StopRequest, heartbeat: Heartbeat) -> Path:
    """Take a file in the run's folder for a request, on a machine's first rank; returns which, to be removed then."""
    file = folder / STOP_FILE
    if os.environ.get("LOCAL_RANK", "0") == "0":
        heartbeat.at_every_beat(lambda: stop.ask("a stop file") if file.exists() else None)
    return file


def this_birth() -> StartInfo:
    """When this start of the run began, which is now, and what a supervisor says of why."""
    return StartInfo(time.time(), **json.loads(os.environ.get(RESTARTED, "{}")))


def as_rank(work: Callable[[], bool | None]) -> NoReturn:
    """Do this rank's work and end: with 0, with 75 where it was cut short, or with an error's exit code and its line.

    Args:
        work: returns False where it was cut short.
    """
    try:
        is_cut_short = work() is False
        end = Outcome(EXIT_STOPPED, STOPPED, "asked to stop") if is_cut_short else Outcome(0, DONE, "all is done")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            _say(f"mcl: {error}")
        end = Outcome(error.exit_code, USER, str(error))
    except KeyboardInterrupt:
        end = Outcome(EXIT_FAILURE, STOPPED, "interrupted")
    except Exception as error:
        if _is_of_another_rank(error):
            _say(f"mcl: {LOST_LINE}")
            end = Outcome(EXIT_FAILURE, LOST, LOST_LINE)
        else:
            _say(traceback.format_exc())
            end = Outcome(EXIT_FAILURE, CRASHED, traceback.format_exception_only(error)[-1].strip())
    _leave(end)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_of_another_rank(error: Exception) -> bool:
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and LOST_RANK in str(error))


def _say(text: str) -> None:
    with suppress(OSError):  # of a terminal that was closed
        print(text, file=sys.stderr, flush=True)


def _leave(end: Outcome) -> NoReturn:
    """End this rank at once: tearing down DeepSpeed's process groups aborts about one run in twenty."""
    if folder := os.environ.get(RUNTIME):
        with suppress(OSError):
            end.write(Path(folder), int(os.environ.get("RANK", "0")))
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(end.exit_code)

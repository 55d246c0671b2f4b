"""Ranks of this machine, started by the DeepSpeed launcher; each exits without tearing DeepSpeed down."""

import base64
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.supervision.messages import log, print_safely
from launch.supervision.outcome import CRASHED, DONE, LOST, STOPPED, USER, Outcome
from launch.supervision.processes import ProcessEntry
from mcl_dist.distributed.heartbeat import Heartbeat
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED, RankError, UserError
from mcl_dist.run_log.goodput import StartInfo

RUNTIME = "MCL_RUNTIME"  # environment variable of ranks: the folder of the node's supervisor
RESTARTED = "MCL_RESTARTED"  # environment variable of ranks: the cause of this restart, as JSON
STOP_FILE = "stop"  # requests a stop, in the run's folder or the supervisor's
LEAVE_SECONDS = 50.0  # to save without a launcher; the next run waits a little longer for the run folder's lock
LOST_CONNECTION = "gloo/transport"  # source file in gloo's errors of a connection that is closed, reset or broken
LOST_RANK_REASON = "another rank is gone, which ends this run; see the message of that rank"


@dataclass(frozen=True)
class NodeSpec:
    """This node's place in a run: the ranks of each node, its number from 0, and the rendezvous on node 0."""

    num_ranks: int
    num_nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def launcher_command(script: str, arguments: Sequence[str], node_spec: NodeSpec) -> list[str]:
    """The command that runs a script with these arguments once for each rank of this node."""
    world = json.dumps({f"node{node}": _devices(node_spec.num_ranks) for node in range(node_spec.num_nodes)})
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--log_level", "critical"]
    command += ["--world_info", base64.urlsafe_b64encode(world.encode()).decode()]
    command += ["--node_rank", str(node_spec.node_rank)]
    command += ["--master_addr", node_spec.address, "--master_port", str(node_spec.port or free_port())]
    return [*command, str(Path(script).resolve()), *arguments]


def _devices(num_ranks: int) -> list[str]:
    """An entry of CUDA_VISIBLE_DEVICES for each rank; -1 hides all GPUs.

    DeepSpeed's launcher overwrites the variable, so without these entries ranks would see GPUs that the user hides.
    """
    import torch

    if not torch.cuda.is_available():
        return ["-1"] * num_ranks
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:num_ranks]
    return chosen if len(chosen) == num_ranks and all(chosen) else [str(rank) for rank in range(num_ranks)]


def launcher_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the launcher and its ranks, with `more` variables."""
    import torch

    environment = {**os.environ, **(more or {})}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def launch_ranks(script: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Run a script with these arguments once for each rank; returns the launcher's exit code."""
    command = launcher_command(script, arguments, NodeSpec(num_ranks))
    return subprocess.run(command, env=launcher_environment(), check=False).returncode


def start_rank_watch() -> tuple[StopRequest, Heartbeat]:
    """Start this rank's signal handling and heartbeat; call it before anything that takes long."""
    stop = StopRequest()
    stop.handle_signals()
    folder = os.environ.get(RUNTIME)
    heartbeat = Heartbeat(Path(folder) if folder else None, int(os.environ.get("RANK", "0")))
    heartbeat.start()
    return stop, heartbeat


def watch_stop_file(folder: Path, stop: StopRequest, heartbeat: Heartbeat) -> Path:
    """Request a stop when a stop file is in the run's folder, on a machine's first rank; returns the file's path.

    The caller removes the file after the stop.
    """
    file = folder / STOP_FILE
    if os.environ.get("LOCAL_RANK", "0") == "0":
        heartbeat.on_beat(lambda: stop.request("a stop file") if file.exists() else None)
    return file


def stop_with_parent(stop: StopRequest, seconds: float = LEAVE_SECONDS) -> None:
    """Request this rank's stop when its launcher or supervisor is gone, and exit after so many seconds.

    Once killed, they can neither end nor restart it, so it would train on, into the folder of the run that replaces it.
    """
    poll = select.poll()
    for pid in (launchers := list(_launchers())):
        poll.register(os.pidfd_open(pid), select.POLLIN)

    def watch() -> None:
        poll.poll()
        stop.request("launcher gone")
        time.sleep(seconds)
        os._exit(EXIT_FAILURE)

    if launchers:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _launchers() -> Iterator[int]:
    """Process ids of the launcher and, above it, of the supervisor or of DeepSpeed's other processes."""
    pid = os.getppid()
    while pid > 1 and b"deepspeed" in (process := ProcessEntry(pid)).command:
        yield pid
        pid = process.parent
    if RUNTIME in os.environ:
        yield pid


def restart_environment(cause: Outcome | None, num_restarts: int) -> dict[str, str]:
    """The variable with the cause of a restart for the ranks' StartInfo; none at the first start."""
    if cause is None:
        return {}
    return {RESTARTED: json.dumps({"cause": cause.cause, "reason": cause.reason, "attempt": num_restarts})}


def read_start_info() -> StartInfo:
    """This start of the run: its time, which is now, and the supervisor's cause of the restart, if any."""
    return StartInfo(time.time(), **json.loads(os.environ.get(RESTARTED, "{}")))


def run_as_rank(work: Callable[[], bool | None]) -> NoReturn:
    """Do this rank's work, which returns False after a stop; exit with 0, 75 after a stop, or an error's exit code."""
    try:
        is_stopped = work() is False
        outcome = Outcome(EXIT_STOPPED, STOPPED, "asked to stop") if is_stopped else Outcome(0, DONE, "all is done")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            log(str(error))
        outcome = Outcome(error.exit_code, USER, str(error))
    except KeyboardInterrupt:
        outcome = Outcome(EXIT_FAILURE, STOPPED, "interrupted")
    except Exception as error:
        outcome = _crash_outcome(error)
    _exit(outcome)


def _crash_outcome(error: Exception) -> Outcome:
    """Print an unexpected error; returns its outcome."""
    from torch import distributed

    is_lost_connection = isinstance(error, RuntimeError) and LOST_CONNECTION in str(error)
    if is_lost_connection or isinstance(error, distributed.DistError):
        log(LOST_RANK_REASON)
        return Outcome(EXIT_FAILURE, LOST, LOST_RANK_REASON)
    print_safely(traceback.format_exc(), sys.stderr)
    return Outcome(EXIT_FAILURE, CRASHED, traceback.format_exception_only(error)[-1].strip())


def free_port() -> int:
    """A port that no process listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exit(outcome: Outcome) -> NoReturn:
    """Write the outcome and exit at once: tearing down DeepSpeed's process groups aborts about one run in twenty."""
    if folder := os.environ.get(RUNTIME):
        with suppress(OSError):
            outcome.write(Path(folder), int(os.environ.get("RANK", "0")))
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(outcome.exit_code)

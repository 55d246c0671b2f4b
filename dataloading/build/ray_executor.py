"""Run tasks on a Ray cluster, in the order of their items; a task whose node dies runs again on another node."""

import logging
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from dataloading.build.local_executor import Item, Result, exit_with_parent
from mcl_dist.errors import ConfigError, UserError

MAX_RETRIES = 10  # of one task: a cluster may lose nodes many times in a night
CHECK_SECONDS = 2.0  # between checks of the cluster while a result is pending
CAPACITY_TIMEOUT = 60.0  # seconds of a cluster that cannot run a single task: another node may join
ANSWER_SECONDS = 10.0  # for the head node to accept a connection, and for the driver to disconnect

Message = tuple[Literal["result", "warning", "failed", "broken", "done"], Any]


@dataclass(frozen=True)
class RayExecutor:
    """Runs each task on a processor of any node of a Ray cluster; computes at most two results per processor ahead.

    Every node needs this package, and the videos at the same URL.

    Attributes:
        address: `host:port` of the head node; empty: `RAY_ADDRESS`, the cluster of this machine, or a new local one.
        gpus: GPUs per task, may be a fraction.
        max_retries: how often a task runs again after its node or process died.
        warn: takes a line for each lost node.
    """

    address: str = ""
    gpus: float = 0.0
    max_retries: int = MAX_RETRIES
    warn: Callable[[str], None] = logging.getLogger(__name__).warning

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise ConfigError("--executor ray: Ray is not installed; pip install -c constraints.txt '.[ray]'")

    @property
    def description(self) -> dict[str, Any]:
        """The executor's fields in `build.json`."""
        return {"executor": "ray"}

    @contextmanager
    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Iterator[Result]]:
        """Yield results of `function` in the order of `items`; no task outlives the block, however it ends.

        Raises:
            UserError: while iterating, when the cluster cannot be reached, has no node left, or a task fails on
                every retry.
        """
        # Ray prints to any stream and kills its driver when the head node is gone, so the driver is its own process.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.NamedTemporaryFile(prefix="mcl-ray-") as log, receiver:
            arguments = (sender, log.name, self.address, self._task_options(), function, items)
            driver = context.Process(target=_drive, args=arguments, name="ray-driver", daemon=True)
            driver.start()
            sender.close()
            try:
                yield self._results(receiver, Path(log.name))
            finally:
                driver.terminate()
                driver.join(ANSWER_SECONDS)
                driver.kill()
                driver.join()

    def _task_options(self) -> dict[str, Any]:
        return {"num_cpus": 1, "num_gpus": self.gpus, "max_retries": self.max_retries, "scheduling_strategy": "SPREAD"}

    def _results(self, receiver: Connection, log: Path) -> Iterator[Any]:
        while True:
            kind, value = _receive(receiver, log)
            if kind == "done":
                return
            if kind == "failed":
                raise value
            if kind == "broken":
                raise RuntimeError(value)
            if kind == "warning":
                self.warn(value)
            else:
                yield value


def _receive(receiver: Connection, log: Path) -> Message:
    try:
        message: Message = receiver.recv()
    except EOFError as error:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        raise UserError(
            f"Ray: the driver ended ({last.strip()}); check that the cluster runs, then try again"
        ) from error
    return message


def _drive(
    sender: Connection,
    log: str,
    address: str,
    task_options: dict[str, Any],
    function: Callable[[Any], Any],
    items: Sequence[Any],
) -> None:
    """Body of the driver process: run the tasks on Ray and send the results; blocks while the pipe is full."""
    exit_with_parent()
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import ray

    try:
        _connect(address)
        for message in _run_tasks(task_options, function, items):
            sender.send(message)
        sender.send(("done", None))
    except UserError as error:
        sender.send(("failed", error))
    except Exception:
        sender.send(("broken", traceback.format_exc()))
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:  # Ray would retry for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Ray at {address or 'this machine'}: {reason}; start a cluster by `ray start --head`, give its --address"
        ) from error


def _run_tasks(task_options: dict[str, Any], function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Message]:
    import ray

    task = ray.remote(_run_task).options(**task_options)
    shared = ray.put(function)
    cluster = _Cluster(task_options["num_gpus"])
    waiting = iter(items)
    pending: deque[tuple[Any, Any]] = deque()
    while True:
        # A cluster may grow and shrink, so its capacity is read each time.
        wanted = max(0, 2 * max(1, cluster.capacity()) - len(pending))
        pending.extend((item, task.remote(shared, item)) for item in islice(waiting, wanted))
        if not pending:
            break
        item, reference = pending.popleft()
        while not ray.wait([reference], timeout=CHECK_SECONDS)[0]:
            yield from cluster.lost_nodes()
            cluster.check()
        result = _get(item, reference)
        yield ("failed", result) if isinstance(result, UserError) else ("result", result)
    yield from cluster.lost_nodes()


def _run_task(function: Callable[[Any], Any], item: Any) -> Any:
    """Run the task on a node; returns a `UserError` as a result, so that Ray does not wrap it."""
    try:
        return function(item)
    except UserError as error:
        return error


def _get(item: Any, reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug of this program, with its traceback
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{item}: its node or process died on every try; given up ({reason})") from error


class _Cluster:
    """The nodes of the cluster that Ray is connected to."""

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        self._alive = self._living_nodes()
        self._no_capacity_since: float | None = None

    def capacity(self) -> int:
        """Number of tasks that all living nodes can run at once."""
        import ray

        resources = ray.cluster_resources()
        cpus = resources.get("CPU", 0)
        return int(min(cpus, resources.get("GPU", 0) / self._gpus) if self._gpus else cpus)

    def lost_nodes(self) -> Iterator[Message]:
        """Yield a warning for each node lost since the last call."""
        before, self._alive = self._alive, self._living_nodes()
        for node in before.keys() - self._alive.keys():
            yield "warning", f"node {before[node]} of the Ray cluster is gone; other nodes build its videos"

    def check(self) -> None:
        """Raise `UserError` once the cluster has been without capacity for `CAPACITY_TIMEOUT`."""
        now = time.monotonic()
        if self.capacity():
            self._no_capacity_since = None
            return
        self._no_capacity_since = self._no_capacity_since or now
        if now - self._no_capacity_since > CAPACITY_TIMEOUT:
            raise UserError(
                f"Ray: no node has had a processor{' and a GPU' if self._gpus else ''} for {CAPACITY_TIMEOUT:.0f} s; "
                "start nodes by `ray start --address`, then run the same command again"
            )

    def _living_nodes(self) -> dict[str, str]:
        """Addresses by node id."""
        import ray

        return {
            node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            for node in ray.nodes()
            if node["Alive"]
        }

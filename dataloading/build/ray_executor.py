"""Tasks on a Ray cluster, in the order of their items; one whose node dies is done again elsewhere."""

from __future__ import annotations

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

from dataloading.build.local_executor import Item, Result, follow_parent
from mcl_dist.errors import ConfigError, UserError

MAX_RETRIES = 10  # of one task: nodes of a cluster may be taken away many times in a night
CHECK_SECONDS = 2.0  # between looks at the cluster while a result is waited for
PATIENCE_SECONDS = 60.0  # for a cluster without room for a task: another node may join
ANSWER_SECONDS = 10.0  # for the cluster's head to take a connection, and for the driver to leave it

Message = tuple[Literal["result", "told", "failed", "broken", "done"], Any]


@dataclass(frozen=True)
class RayExecutor:
    """Runs tasks on a Ray cluster, each on a processor of any node; at most two results a processor wait.

    What tasks import and read must be there on every node: this package, and the videos at the same URL.

    Attributes:
        address: of the cluster's head, `host:port`; empty for the one that `RAY_ADDRESS` or this machine has,
            or for one on this machine alone.
        gpus: share of a GPU that each task takes.
        max_retries: how often a task is done again whose node or process died.
        tell: is told in a line when nodes are gone.
    """

    address: str = ""
    gpus: float = 0.0
    max_retries: int = MAX_RETRIES
    tell: Callable[[str], None] = logging.getLogger(__name__).warning

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise ConfigError("--executor ray: Ray is not installed; pip install -c constraints.txt '.[ray]'")

    @property
    def description(self) -> dict[str, Any]:
        """What `build.json` says of it."""
        return {"executor": "ray"}

    @contextmanager
    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Iterator[Result]]:
        """Results of `function` in the order of `items`; whatever ends the block, no task is left behind.

        Raises:
            UserError: while iterating, when the cluster cannot be reached, has no node left, or a task of its
                cannot be finished.
        """
        # Ray prints where it likes and ends its driver when the cluster's head is gone: it has a process of its own.
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
        return {
            "num_cpus": 1,
            "num_gpus": self.gpus,
            "max_retries": self.max_retries,
            "scheduling_strategy": "SPREAD",
        }

    def _results(self, receiver: Connection, log: Path) -> Iterator[Any]:
        while True:
            kind, value = _received(receiver, log)
            if kind == "done":
                return
            if kind == "failed":
                raise value
            if kind == "broken":
                raise RuntimeError(value)
            if kind == "told":
                self.tell(value)
            else:
                yield value


def _received(receiver: Connection, log: Path) -> Message:
    try:
        message: Message = receiver.recv()
    except EOFError as error:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise UserError(f"Ray: its driver ended ({last.strip()}); see that the cluster runs, then try again") from error
    return message


def _drive(
    sender: Connection,
    log: str,
    address: str,
    task_options: dict[str, Any],
    function: Callable[[Any], Any],
    items: Sequence[Any],
) -> None:
    """The process that talks to Ray: sends the results, and waits where nobody takes them."""
    follow_parent()
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import ray

    try:
        _connect(address)
        for message in _messages(task_options, function, items):
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
        if address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Ray at {address or 'this machine'}: {reason}; start a cluster by `ray start --head`, give its --address"
        ) from error


def _messages(task_options: dict[str, Any], function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Message]:
    import ray

    task = ray.remote(_guarded).options(**task_options)
    shared = ray.put(function)
    cluster = _Cluster(task_options["num_gpus"])
    waiting = iter(items)
    pending: deque[tuple[Any, Any]] = deque()
    while True:
        # A cluster may grow and shrink: how many results may wait is asked anew each time.
        wanted = max(0, 2 * max(1, cluster.num_places()) - len(pending))
        pending.extend((item, task.remote(shared, item)) for item in islice(waiting, wanted))
        if not pending:
            break
        item, reference = pending.popleft()
        while not ray.wait([reference], timeout=CHECK_SECONDS)[0]:
            yield from cluster.losses()
            cluster.check()
        result = _got(item, reference)
        yield ("failed", result) if isinstance(result, UserError) else ("result", result)
    yield from cluster.losses()


def _guarded(function: Callable[[Any], Any], item: Any) -> Any:
    """Runs on a node: what a person can mend comes back as a result, without Ray's wrapping."""
    try:
        return function(item)
    except UserError as error:
        return error


def _got(item: Any, reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a mistake of ours, with its traceback
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{item}: its node or process died time and again, given up; Ray says: {reason}") from error


class _Cluster:
    """The nodes of the cluster that Ray is connected to."""

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        self._alive = self._names()
        self._without_since: float | None = None

    def num_places(self) -> int:
        """How many tasks all nodes that are alive have room for."""
        import ray

        there = ray.cluster_resources()
        room = there.get("CPU", 0)
        return int(min(room, there.get("GPU", 0) / self._gpus) if self._gpus else room)

    def losses(self) -> Iterator[Message]:
        """A line for each node that is gone since the last call."""
        before, self._alive = self._alive, self._names()
        for node in before.keys() - self._alive.keys():
            yield "told", f"node {before[node]} of the Ray cluster is gone; its videos are built elsewhere"

    def check(self) -> None:
        """Raises `UserError` when there has been no room for a task for a while."""
        now = time.monotonic()
        if self.num_places():
            self._without_since = None
            return
        self._without_since = self._without_since or now
        if now - self._without_since > PATIENCE_SECONDS:
            raise UserError(
                f"Ray: no node has had a processor{' and a GPU' if self._gpus else ''} for {PATIENCE_SECONDS:.0f} s; "
                "start nodes by `ray start --address`, then run the same command again"
            )

    def _names(self) -> dict[str, str]:
        import ray

        return {
            node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            for node in ray.nodes()
            if node["Alive"]
        }

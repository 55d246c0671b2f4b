"""A run on this node: its runtime folder, the rendezvous with the other nodes, the supervisor and its outcome."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from launch.supervision.deepspeed_launcher import NodeSpec
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.messages import print_safely
from launch.supervision.outcome import OUTCOME_LINE
from launch.supervision.rendezvous import RendezvousClient, RendezvousServer
from launch.supervision.supervisor import Supervisor

EXIT_RETRYABLE = 76  # of a node with --attached: it failed, and another attempt can succeed
PID_FILE, OUTCOME_FILE = "supervisor.pid", "outcome.json"


def supervise_node(
    script: Path,
    arguments: Sequence[str],
    node_spec: NodeSpec,
    limits: SuperviseConfig,
    event_log: Path,
    *,
    runtime: str | None = None,
    attached: bool = False,
) -> int:
    """Supervise this node's ranks until the run ends; returns the exit code.

    Args:
        script, arguments: command of a rank.
        node_spec: this node's place in the run.
        limits: of hangs and restarts.
        event_log: the run's `log.jsonl`.
        runtime: local folder for heartbeats, stop requests and the outcome; None for a temporary one.
        attached: whether the cluster controller runs this command: the end of standard input requests a stop, and the
            outcome is printed.
    """
    with ExitStack() as stack:
        folder = Path(runtime or stack.enter_context(TemporaryDirectory(prefix="mcl-")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PID_FILE).write_text(str(os.getpid()))
        outcome = Supervisor(
            script=str(script),
            arguments=arguments,
            node_spec=node_spec,
            limits=limits,
            runtime=folder,
            event_log=event_log,
            rendezvous=_join_rendezvous(node_spec, limits.node_seconds, stack) if node_spec.num_nodes > 1 else None,
            attached=attached,
        ).run()
        text = json.dumps({**asdict(outcome), "retry": outcome.is_retryable, "node": node_spec.node_rank})
        (folder / OUTCOME_FILE).write_text(text)
        if attached:
            print_safely(f"{OUTCOME_LINE} {text}", sys.stdout)
    return EXIT_RETRYABLE if attached and outcome.is_retryable else outcome.exit_code


def _join_rendezvous(node_spec: NodeSpec, timeout_seconds: float, stack: ExitStack) -> RendezvousClient:
    """Connect to node 0, where the server is started first; the stack closes both."""
    if node_spec.node_rank == 0:
        stack.callback(RendezvousServer(node_spec.port, node_spec.num_nodes, timeout_seconds).close)
    client = RendezvousClient(
        node_spec.address, node_spec.port, node_spec.node_rank, node_spec.num_nodes, timeout_seconds
    )
    stack.callback(client.close)
    return client

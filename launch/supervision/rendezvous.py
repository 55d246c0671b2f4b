"""Rendezvous of the nodes' supervisors: all nodes start and end an attempt together.

Node 0 runs the server. Every node's supervisor keeps a connection to it and sends its status twice a second; the reply
is the status of the run. Both sides send states, not commands, so a lost or repeated message changes nothing. An
attempt starts when all nodes are ready, at a port that is free on node 0. It ends for all nodes when it ends on one or
when one sends nothing for too long.
"""

import json
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launch.supervision.deepspeed_launcher import free_port
from launch.supervision.outcome import DONE, LOST, STOPPED, Outcome
from launch.supervision.processes import wait_until
from mcl_dist.errors import EXIT_FAILURE, UserError

STATUS_SECONDS = 0.5
CONNECT_SECONDS = 5.0
MAX_MESSAGE_BYTES = 65536
CLOSE_SECONDS = 5.0  # for the other nodes to receive the run's outcome
READY, RUNNING, ENDED = "ready", "running", "ended"


@dataclass
class NodeStatus:
    """Message of a node to the server.

    Attributes:
        state: `ready`, `running` or `ended`.
        attempt_id: the newest attempt that this node has joined; "" before the first.
        outcome: of that attempt on this node, once it has ended.
        in_slow_phase: whether a rank of this node is in a slow phase.
    """

    node_rank: int
    num_nodes: int
    state: str = READY
    attempt_id: str = ""
    outcome: dict[str, Any] | None = None
    in_slow_phase: bool = False


@dataclass
class RunStatus:
    """Message of the server to a node.

    Attributes:
        attempt_id: of the newest attempt; "" if the node has no part in it.
        port: where its ranks meet.
        root_cause: outcome of the attempt before it, from a node that saw more than the loss of the others.
        in_slow_phase: whether a rank of any node is in a slow phase.
        missing: nodes that are not ready.
    """

    attempt_id: str = ""
    port: int = 0
    outcome: dict[str, Any] | None = None
    root_cause: dict[str, Any] | None = None
    in_slow_phase: bool = False
    missing: list[int] = field(default_factory=list)
    refusal: str = ""


class JsonConnection:
    """A connection that carries one line of JSON for each message.

    Raises:
        OSError: from `send` and `receive`, if the peer is gone, is silent or sends anything else.
    """

    def __init__(self, connection: socket.socket, timeout_seconds: float) -> None:
        connection.settimeout(timeout_seconds)
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: NodeStatus | RunStatus) -> None:
        """Send one message."""
        self._connection.sendall(json.dumps(asdict(message)).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for one message."""
        line = self._file.readline(MAX_MESSAGE_BYTES)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ConnectionError("the connection is closed, or its peer is no supervisor") from error
        if not isinstance(message, dict):
            raise ConnectionError("the peer is no supervisor")
        return message

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class RendezvousServer:
    """Node 0's side: the connected nodes and the status of the run; a node that is silent for too long is lost."""

    def __init__(self, port: int, num_nodes: int, timeout_seconds: float) -> None:
        self._num_nodes = num_nodes
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._nodes: dict[int, tuple[JsonConnection, NodeStatus]] = {}
        self._participants: dict[int, JsonConnection] = {}  # of the attempt that runs
        self._outcomes: dict[int, Outcome] = {}  # of the newest attempt, by node
        self._run = RunStatus()
        try:
            self._server = socket.create_server(("", port), backlog=num_nodes)
        except OSError as error:
            raise UserError(f"port {port}: cannot listen ({error.strerror}); choose another --master-port") from error
        threading.Thread(target=self._accept, name="rendezvous", daemon=True).start()

    def close(self) -> None:
        """Stop listening, after the other nodes have received the outcome and disconnected."""
        wait_until(lambda: not self._nodes, CLOSE_SECONDS, STATUS_SECONDS / 10)
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the server is closed
            while True:
                socket_, _ = self._server.accept()
                connection = JsonConnection(socket_, self._timeout_seconds)
                threading.Thread(target=self._serve, args=(connection,), name="rendezvous-node", daemon=True).start()

    def _serve(self, connection: JsonConnection) -> None:
        """Reply to one node until it is gone."""
        node_rank = -1
        try:
            while True:
                node = NodeStatus(**connection.receive())
                if node.num_nodes != self._num_nodes or not 0 <= node.node_rank < self._num_nodes:
                    refusal = f"node {node.node_rank} of {node.num_nodes} cannot join a run of {self._num_nodes}"
                    connection.send(RunStatus(refusal=refusal))
                    return
                node_rank = node.node_rank
                connection.send(self._update(node, connection))
        except (OSError, TypeError) as error:
            self._remove(node_rank, connection, error)
        finally:
            connection.close()

    def _update(self, node: NodeStatus, connection: JsonConnection) -> RunStatus:
        """Take a node's status; returns the reply."""
        with self._lock:
            known, _ = self._nodes.get(node.node_rank, (None, None))
            self._nodes[node.node_rank] = (connection, node)
            if known is not connection and node.node_rank in self._participants:
                self._end(Outcome(EXIT_FAILURE, LOST, f"node {node.node_rank} has reconnected"))
            if node.attempt_id == self._run.attempt_id and node.outcome:
                self._outcomes[node.node_rank] = Outcome(**node.outcome)
                self._end(self._outcomes[node.node_rank])
            self._start_if_all_are_ready()
            in_slow_phase = any(node.in_slow_phase for _, node in self._nodes.values())
            is_outside = self._participants.get(node.node_rank) is not connection and not self._run.outcome
            status = RunStatus() if is_outside else self._run
            return replace(status, in_slow_phase=in_slow_phase, missing=self._missing())

    def _start_if_all_are_ready(self) -> None:
        if not self._missing() and (self._run.outcome or not self._run.attempt_id):
            causes = [outcome for outcome in self._outcomes.values() if outcome.is_retryable and outcome.cause != LOST]
            self._outcomes = {}
            root_cause = asdict(causes[0]) if causes else None
            self._run = RunStatus(attempt_id=secrets.token_hex(8), port=free_port(), root_cause=root_cause)
            self._participants = {node_rank: connection for node_rank, (connection, _) in self._nodes.items()}

    def _end(self, outcome: Outcome) -> None:
        """End the attempt for all nodes; the first outcome stays."""
        if self._run.attempt_id and not self._run.outcome:
            self._run.outcome = asdict(outcome)
            self._participants = {}

    def _remove(self, node_rank: int, connection: JsonConnection, error: Exception) -> None:
        with self._lock:
            if self._nodes.get(node_rank, (None,))[0] is not connection:
                return  # the node has reconnected, or never sent a status
            _, node = self._nodes.pop(node_rank)
            if self._participants.get(node_rank) is connection and node.state != ENDED:
                is_silent = isinstance(error, TimeoutError)
                problem = f"was silent for {self._timeout_seconds:.0f} s" if is_silent else "has disconnected"
                self._end(Outcome(EXIT_FAILURE, LOST, f"node {node_rank} {problem}"))

    def _missing(self) -> list[int]:
        ready = {node_rank for node_rank, (_, node) in self._nodes.items() if node.state == READY}
        return [node_rank for node_rank in range(self._num_nodes) if node_rank not in ready]


class RendezvousClient:
    """A node's side, which exchanges messages in a background thread; a server that is silent for too long is lost."""

    def __init__(self, address: str, port: int, node_rank: int, num_nodes: int, timeout_seconds: float) -> None:
        self._server = (address, port)
        self._node = NodeStatus(node_rank, num_nodes)
        self._timeout_seconds = timeout_seconds
        self._run = RunStatus()
        self._last_received = time.monotonic()
        self._num_received = 0
        self._is_closed = False
        self._wake = threading.Event()
        threading.Thread(target=self._stay_connected, name="rendezvous-member", daemon=True).start()

    @property
    def any_in_slow_phase(self) -> bool:
        """Whether a rank of any node is in a slow phase."""
        return self._run.in_slow_phase

    @property
    def missing(self) -> list[int]:
        """Nodes that are not ready; node 0 if it has not replied."""
        return self._run.missing if self._num_received else [0]

    @property
    def root_cause(self) -> Outcome | None:
        """Outcome of the previous attempt on a node that saw more than the loss of the others."""
        return _parse_outcome(self._run.root_cause)

    @property
    def final_outcome(self) -> Outcome | None:
        """Outcome of the run, once it has ended on another node and cannot be retried."""
        outcome = _parse_outcome(self._run.outcome)
        return outcome if outcome and not outcome.is_retryable else None

    def set_ready(self) -> None:
        """Report that this node can start an attempt."""
        self._set_state(READY)

    def join_attempt(self) -> int:
        """Join the attempt that has started; returns the port where its ranks meet, 0 before all nodes are ready.

        Raises:
            UserError: the server refuses this node.
        """
        run = self._run
        if run.refusal:
            address, port = self._server
            raise UserError(f"{address}:{port}: {run.refusal}; give all nodes the same --nodes")
        if run.outcome or not run.port or run.attempt_id == self._node.attempt_id:
            return 0
        self._node = replace(self._node, state=RUNNING, attempt_id=run.attempt_id, outcome=None)
        return run.port

    def report_phase(self, *, in_slow_phase: bool) -> None:
        """Report whether a rank of this node is in a slow phase."""
        self._node.in_slow_phase = in_slow_phase

    def failure_elsewhere(self) -> Outcome | None:
        """Why this node's ranks cannot continue: the attempt has failed on another node, or node 0 is lost."""
        run = self._run
        silent_seconds = time.monotonic() - self._last_received
        if silent_seconds > self._timeout_seconds:
            return Outcome(EXIT_FAILURE, LOST, f"node 0 was silent for {silent_seconds:.0f} s")
        if run.attempt_id != self._node.attempt_id:
            return Outcome(EXIT_FAILURE, LOST, "node 0 has restarted")
        outcome = _parse_outcome(run.outcome)
        return outcome if outcome and outcome.cause not in (DONE, STOPPED) else None

    def report_outcome(self, outcome: Outcome) -> None:
        """Report how this attempt ended on this node."""
        self._node.outcome = asdict(outcome)
        self._set_state(ENDED)

    def close(self) -> None:
        """Disconnect, once the server has received the last status."""
        num_received = self._num_received + 2

        def is_acknowledged() -> bool:
            if self._num_received < num_received:
                self._wake.set()
                return False
            return True

        wait_until(is_acknowledged, CLOSE_SECONDS, STATUS_SECONDS / 10)
        self._is_closed = True

    def _set_state(self, state: str) -> None:
        self._node.state = state
        self._wake.set()

    def _stay_connected(self) -> None:
        while not self._is_closed:
            with suppress(OSError, TypeError):
                self._exchange_messages()
            time.sleep(STATUS_SECONDS)

    def _exchange_messages(self) -> None:
        connection = JsonConnection(socket.create_connection(self._server, CONNECT_SECONDS), self._timeout_seconds)
        try:
            while not self._is_closed:
                connection.send(self._node)
                self._run = RunStatus(**connection.receive())
                self._last_received = time.monotonic()
                self._num_received += 1
                self._wake.wait(STATUS_SECONDS)
                self._wake.clear()
        finally:
            connection.close()


def _parse_outcome(fields: dict[str, Any] | None) -> Outcome | None:
    return Outcome(**fields) if fields else None

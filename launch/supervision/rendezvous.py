"""How the supervisors of all nodes begin an attempt together, and end it together.

The first node's supervisor is the host: the others keep a connection to it, over which each says twice a second what it
is at, and hears what the run is at. States are told rather than orders, so a line that is lost or repeated changes
nothing. An attempt begins when all nodes are ready, at a port that was free on the first node a moment ago; it ends for
all when it ends for one, or when one is silent for too long.
"""

from __future__ import annotations

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
from mcl_dist.errors import EXIT_FAILURE, UserError

TELL_SECONDS = 0.5
CONNECT_SECONDS = 5.0
LINE_BYTES = 65536
GOODBYE_SECONDS = 5.0  # for the other nodes to hear how the run ended
READY, RUNNING, ENDED = "ready", "running", "ended"


@dataclass
class NodeStatus:
    """What a node says of itself; `end` is how the attempt `number` ended there, `pauses` excuses others who wait."""

    node: int
    nodes: int
    state: str = READY
    number: str = ""
    end: dict[str, Any] | None = None
    pauses: bool = False


@dataclass
class RunStatus:
    """What the host says to a node.

    Attributes:
        number: of the attempt, "" before the node has part in one.
        port: where its ranks meet.
        end: how it ended, once it has.
        before: how the attempt before it ended, as the node has it that saw more than others missing.
        pauses: whether a rank of any node is at what may take long.
        missing: nodes that are waited for.
        refusal: why this node can have no part.
    """

    number: str = ""
    port: int = 0
    end: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    pauses: bool = False
    missing: list[int] = field(default_factory=list)
    refusal: str = ""


class JsonConnection:
    """JSON, a line a message, over a connection.

    Raises:
        OSError: from `send` and `receive`, when the other end is gone or silent, or does not speak so.
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        connection.settimeout(patience)
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: NodeStatus | RunStatus) -> None:
        """Send one message."""
        self._connection.sendall(json.dumps(asdict(message)).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Wait for one message."""
        line = self._file.readline(LINE_BYTES)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ConnectionError("the connection was closed, or is not of a supervisor") from error
        if not isinstance(message, dict):
            raise ConnectionError("not of a supervisor")
        return message

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class RendezvousServer:
    """The first node's side: who is there, and what the run is at.

    Args:
        port: where supervisors come to.
        num_nodes: that make a run.
        patience: seconds of silence after which a node is lost.
    """

    def __init__(self, port: int, num_nodes: int, patience: float) -> None:
        self._num_nodes = num_nodes
        self._patience = patience
        self._lock = threading.Lock()
        self._nodes: dict[int, tuple[JsonConnection, NodeStatus]] = {}
        self._members: dict[int, JsonConnection] = {}
        self._said: dict[int, Outcome] = {}  # how the attempt ended, by node
        self._run = RunStatus()
        try:
            self._server = socket.create_server(("", port), backlog=num_nodes)
        except OSError as error:
            raise UserError(
                f"port {port}: cannot be listened on ({error.strerror}); choose another --master-port"
            ) from error
        threading.Thread(target=self._accept, name="rendezvous", daemon=True).start()

    def close(self) -> None:
        """Stop listening, after the other nodes have heard of the end."""
        deadline = time.monotonic() + GOODBYE_SECONDS
        while self._nodes and time.monotonic() < deadline:
            time.sleep(TELL_SECONDS / 10)
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # of the server that was closed
            while True:
                connection, _ = self._server.accept()
                lines = JsonConnection(connection, self._patience)
                threading.Thread(target=self._serve, args=(lines,), name="rendezvous-node", daemon=True).start()

    def _serve(self, lines: JsonConnection) -> None:
        """Hear one node and answer, until it is gone."""
        number = -1
        try:
            while True:
                node = NodeStatus(**lines.receive())
                if node.nodes != self._num_nodes or not 0 <= node.node < self._num_nodes:
                    lines.send(
                        RunStatus(refusal=f"node {node.node} of {node.nodes} cannot join a run of {self._num_nodes}")
                    )
                    return
                number = node.node
                lines.send(self._heard(node, lines))
        except (OSError, TypeError) as error:
            self._lost(number, lines, error)
        finally:
            lines.close()

    def _heard(self, node: NodeStatus, lines: JsonConnection) -> RunStatus:
        with self._lock:
            known, _ = self._nodes.get(node.node, (None, None))
            self._nodes[node.node] = (lines, node)
            if known is not lines and node.node in self._members:
                self._end(Outcome(EXIT_FAILURE, LOST, f"node {node.node} came back anew"))
            if node.number == self._run.number and node.end:
                self._said[node.node] = Outcome(**node.end)
                self._end(self._said[node.node])
            self._begin_if_all_are_ready()
            is_outside = self._members.get(node.node) is not lines and not self._run.end
            run = RunStatus(pauses=any(node.pauses for _, node in self._nodes.values()), missing=self._missing())
            if is_outside:
                return run
            now = self._run
            return replace(run, number=now.number, port=now.port, end=now.end, before=now.before)

    def _begin_if_all_are_ready(self) -> None:
        if not self._missing() and (self._run.end or not self._run.number):
            seen = [end for end in self._said.values() if end.may_be_mended and end.cause != LOST]
            self._said = {}
            before = asdict(seen[0]) if seen else None
            self._run = RunStatus(number=secrets.token_hex(8), port=free_port(), before=before)
            self._members = {node: lines for node, (lines, _) in self._nodes.items()}

    def _end(self, end: Outcome) -> None:
        """The attempt is over for all; the first reason stays."""
        if self._run.number and not self._run.end:
            self._run.end = asdict(end)
            self._members = {}

    def _lost(self, number: int, lines: JsonConnection, error: Exception) -> None:
        with self._lock:
            if self._nodes.get(number, (None,))[0] is not lines:
                return  # it came back already, or never was there
            _, node = self._nodes.pop(number)
            if self._members.get(number) is lines and node.state != ENDED:
                silent = isinstance(error, TimeoutError)
                what = f"was silent for {self._patience:.0f} s" if silent else "has gone"
                self._end(Outcome(EXIT_FAILURE, LOST, f"node {number} {what}"))

    def _missing(self) -> list[int]:
        ready = {number for number, (_, node) in self._nodes.items() if node.state == READY}
        return [number for number in range(self._num_nodes) if number not in ready]


class RendezvousClient:
    """A node's side, kept up by a thread of its own.

    Args:
        address, port: of the host.
        node, num_nodes: which of how many this is.
        patience: seconds of silence after which the host is lost.
    """

    def __init__(self, address: str, port: int, node: int, num_nodes: int, patience: float) -> None:
        self._where = (address, port)
        self._node = NodeStatus(node, num_nodes)
        self._patience = patience
        self._run = RunStatus()
        self._last_heard = time.monotonic()
        self._num_heard = 0
        self._is_closed = False
        self._wake = threading.Event()
        threading.Thread(target=self._keep_up, name="rendezvous-member", daemon=True).start()

    @property
    def others_pause(self) -> bool:
        """Whether a rank of any node is at what may take long."""
        return self._run.pauses

    @property
    def missing(self) -> list[int]:
        """Nodes that are waited for; the first where it does not answer."""
        return self._run.missing if self._num_heard else [0]

    def ready(self) -> None:
        """This node can begin an attempt."""
        self._say(READY)

    def begun(self) -> int:
        """The port at which this attempt's ranks meet; 0 before all nodes are ready.

        Raises:
            UserError: this node can have no part.
        """
        run = self._run
        if run.refusal:
            raise UserError(f"{self._where[0]}:{self._where[1]}: {run.refusal}; give the same --nodes everywhere")
        if run.end or not run.port or run.number == self._node.number:
            return 0
        self._node = replace(self._node, state=RUNNING, number=run.number, end=None)
        return run.port

    @property
    def before(self) -> Outcome | None:
        """How the attempt before this one ended, where a node saw more than others missing."""
        return Outcome(**self._run.before) if self._run.before else None

    def over(self) -> Outcome | None:
        """How the run ended for good on another node, told to one that is ready."""
        end = Outcome(**self._run.end) if self._run.end else None
        return end if end and not end.may_be_mended else None

    def news(self, *, pauses: bool) -> Outcome | None:
        """How this attempt ended on another node, if it did so that this node's ranks cannot go on.

        Args:
            pauses: whether a rank of this node is at what may take long.
        """
        self._node.pauses = pauses
        run = self._run
        silent = time.monotonic() - self._last_heard
        if silent > self._patience:
            return Outcome(EXIT_FAILURE, LOST, f"node 0 was silent for {silent:.0f} s")
        if run.number != self._node.number:
            return Outcome(EXIT_FAILURE, LOST, "node 0 came back anew")
        end = Outcome(**run.end) if run.end else None
        return end if end and end.cause not in (DONE, STOPPED) else None

    def ended(self, end: Outcome) -> None:
        """Tell how this attempt ended here."""
        self._node.end = asdict(end)
        self._say(ENDED)

    def close(self) -> None:
        """Hang up, once what was said last has been heard."""
        heard, deadline = self._num_heard, time.monotonic() + GOODBYE_SECONDS
        while self._num_heard < heard + 2 and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(TELL_SECONDS / 10)
        self._is_closed = True

    def _say(self, state: str) -> None:
        self._node.state = state
        self._wake.set()

    def _keep_up(self) -> None:
        while not self._is_closed:
            with suppress(OSError, TypeError):
                self._talk()
            time.sleep(TELL_SECONDS)

    def _talk(self) -> None:
        lines = JsonConnection(socket.create_connection(self._where, CONNECT_SECONDS), self._patience)
        try:
            while not self._is_closed:
                lines.send(self._node)
                self._run = RunStatus(**lines.receive())
                self._last_heard = time.monotonic()
                self._num_heard += 1
                self._wake.wait(TELL_SECONDS)
                self._wake.clear()
        finally:
            lines.close()

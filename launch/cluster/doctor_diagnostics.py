"""The diagnostics of `mcl doctor`: collect facts on every node, run an all-reduce between the nodes, check both."""

from __future__ import annotations

import json
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster import doctor_checks
from launch.cluster.doctor_checks import FAIL, NOTE, OK, CheckResult, NodeFacts, Nodes
from launch.cluster.hostfile import Host
from launch.cluster.ssh import CONNECT_SECONDS, Reply, Ssh, remote_command, run_all
from mcl_dist.storage import jsonl

if TYPE_CHECKING:
    from launch.run.config import PretrainConfig

NODE_SECONDS = 90.0  # for the facts of a node, slow stores included
START_SECONDS = 60.0  # for Python and torch to start, also from a cold network file system
THIS_MACHINE = "this machine"
REMEDIES = (  # by a text in ssh's or Python's message
    ("Host key verification failed", "add its key to known_hosts: ssh-keyscan {name} (-p PORT), after checking it"),
    ("Permission denied", "authorise your key there (ssh-copy-id {name}), or name the right one with --ssh-key"),
    ("resolve", "give {name} an address in DNS, /etc/hosts or the ssh configuration"),
    ("No such file", "install this folder and this Python there, at the same paths: {paths}"),
    ("not found", "install this folder and this Python there, at the same paths: {paths}"),
    ("no answer within", "check for a store or a mounted file system that does not answer"),
    ("", "check that it is up and its sshd reachable: ssh {name} true; --ssh-port, --ssh-config if it needs them"),
)


@dataclass
class Diagnostics:
    """Runs all checks.

    Attributes:
        hosts: None for this machine alone.
        config: whose sets, folders and ports are checked.
        master_port: of the rendezvous; None for a free one.
        seconds: timeout of the all-reduce.
        node_seconds: timeout of a node's facts.
    """

    hosts: Sequence[Host] | None
    ssh: Ssh
    config: PretrainConfig | None
    master_port: int | None
    seconds: float
    node_seconds: float = NODE_SECONDS
    _nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def __post_init__(self) -> None:
        self._hosts = {host.name: host for host in self.hosts or ()}
        self._names = list(self._hosts) or [THIS_MACHINE]

    def run(self) -> list[CheckResult]:
        """All rows of the table."""
        requests = {name: self.node_request(name) for name in self._names}
        replies = self._run_script("doctor_node.py", requests, self.node_seconds)
        answers = {name: _parse_lines(reply) for name, reply in replies.items()}
        nodes = {name: lines[0] for name, lines in answers.items() if lines}
        rows = [self._unreached(name, replies[name]) for name, lines in answers.items() if not lines]
        if self._hosts and nodes:
            rows.append(CheckResult("reached", ", ".join(nodes), OK, "over ssh"))
        if nodes:
            slots = {name: host.slots for name, host in self._hosts.items()}
            bounds = {name: _clock_bounds(nodes[name], replies[name]) for name in nodes} if self._hosts else {}
            rows += doctor_checks.check_nodes(nodes, slots, bounds)
            rows += self._check_together({name: facts for name, facts in nodes.items() if not facts["foreign"]})
        if self.config is None:
            found = "no --config: stores, folders and ports are not checked"
            rows.append(CheckResult("configuration", "all", NOTE, found))
        return rows

    def node_request(self, name: str) -> dict[str, Any]:
        """The request to a node for its facts: `node`, `nonce` of marker files, `sets`, `folders`, `listeners`."""
        sets: list[str] = []
        folders: dict[str, str] = {}
        listeners: list[dict[str, Any]] = []
        if (config := self.config) is not None:
            sets = [*(part.url for part in config.data.all_sets), *config.evaluate.sets]
            folders["run"] = config.run.dir
            folders["checkpoints"] = config.checkpoint.folder or f"{config.run.dir}/checkpoints"
            if config.data.cache:
                folders["cache"] = config.data.cache
            if config.monitoring.port is not None:
                slots, monitoring = self._hosts[name].slots if self._hosts else None, config.monitoring
                listeners.append({"address": monitoring.address, "port": monitoring.port, "count": slots})
        if self.master_port is not None and name == self._names[0]:
            listeners.append({"address": "0.0.0.0", "port": self.master_port, "count": 1})
        return {"node": name, "nonce": self._nonce, "sets": sets, "folders": folders, "listeners": listeners}

    def _check_together(self, nodes: Nodes) -> list[CheckResult]:
        """Run the checks between nodes: shared folders and the all-reduce."""
        if not nodes:
            return []
        on_gpus = all(facts["gpus"] for facts in nodes.values() if not facts["torch_error"])
        num_ranks = {name: self._num_ranks(facts, on_gpus) for name, facts in nodes.items()}
        requests = self._link_requests(nodes, num_ranks, on_gpus)
        replies = self._run_script("doctor_link.py", requests, 2 * self.seconds + START_SECONDS)
        self._remove_markers(nodes)
        lines = {name: _parse_lines(reply) for name, reply in replies.items()}
        rows: list[CheckResult] = []
        if len(nodes) > 1:
            visible = {name: found[0]["visible"] for name, found in lines.items() if found}
            first = nodes[_first_with_ranks(num_ranks)]
            paths = {name: first["folders"][name]["url"] for name in _local_folders(first)}
            rows += doctor_checks.check_shared_folders(visible, paths)
        if world_size := sum(num_ranks.values()):
            answers = {name: [line for line in lines[name] if "rank" in line] for name in nodes if num_ranks[name]}
            rows += doctor_checks.check_all_reduce(answers, world_size, on_gpus)
        return rows

    def _link_requests(self, nodes: Nodes, num_ranks: Mapping[str, int], on_gpus: bool) -> dict[str, dict[str, Any]]:
        """The requests for the all-reduce, by node."""
        first = _first_with_ranks(num_ranks)
        common = {
            "nonce": self._nonce,
            "address": self._hosts[first].address if self._hosts else "127.0.0.1",
            "port": self.master_port or nodes[first]["free_port"],
            "world_size": sum(num_ranks.values()),
            "on_gpus": on_gpus,
            "seconds": self.seconds,
        }
        first_ranks = accumulate(num_ranks.values(), initial=0)
        return {
            name: common | {"folders": _local_folders(facts), "ranks": num_ranks[name], "first_rank": first_rank}
            for (name, facts), first_rank in zip(nodes.items(), first_ranks, strict=False)
        }

    def _num_ranks(self, facts: NodeFacts, on_gpus: bool) -> int:
        """Ranks of a node in the all-reduce: none if it cannot import torch."""
        if facts["torch_error"]:
            return 0
        if on_gpus:
            return len(facts["gpus"])
        return 1 if self._hosts else 2

    def _remove_markers(self, nodes: Nodes) -> None:
        commands = {}
        for name, facts in nodes.items():
            if folders := set(_local_folders(facts).values()):
                markers = (f"{folder}/.mcl-doctor-{self._nonce}-{name}" for folder in folders)
                commands[name] = shlex.join(["rm", "-f", "--", *markers])
        self._run_on_nodes(commands, {}, self.node_seconds)

    def _run_script(self, script: str, requests: Mapping[str, dict[str, Any]], seconds: float) -> dict[str, Reply]:
        """Run a script of this folder on each node; a node kills it after so many seconds."""
        command = remote_command([str(Path(__file__).with_name(script))], seconds=seconds)
        inputs = {name: json.dumps(request) for name, request in requests.items()}
        return self._run_on_nodes(dict.fromkeys(requests, command), inputs, seconds)

    def _run_on_nodes(self, commands: Mapping[str, str], inputs: Mapping[str, str], seconds: float) -> dict[str, Reply]:
        local = {name: ["sh", "-c", command] for name, command in commands.items()}
        if self._hosts:
            local = {name: self.ssh.command(name, command) for name, command in commands.items()}
        return run_all(local, seconds + CONNECT_SECONDS, inputs)

    def _unreached(self, name: str, reply: Reply) -> CheckResult:
        problem = self._problem(reply)
        remedy = next(remedy for text, remedy in REMEDIES if text in problem)
        remedy = remedy.format(name=name, paths=f"{Path.cwd()}, {sys.executable}")
        return CheckResult("reached", name, FAIL, problem, remedy)

    def _problem(self, reply: Reply) -> str:
        """Why a node has sent no facts: its last message, or else its exit code or the timeout."""
        if messages := [line for line in reply.stderr.splitlines() if line.strip()]:
            return messages[-1]
        # ssh prints nothing about a command that the host has killed, and exits with a code of its own.
        if reply.exit_code is None or reply.ended - reply.started >= self.node_seconds:
            return f"no answer within {self.node_seconds:.0f} s"
        return f"exit code {reply.exit_code}"


def _parse_lines(reply: Reply) -> list[dict[str, Any]]:
    return list(jsonl.parse_all(reply.stdout.splitlines()))


def _clock_bounds(facts: NodeFacts, reply: Reply) -> tuple[float, float]:
    """Bounds of a node's clock minus ours: the node works between our request and the reply."""
    return facts["ended"] - reply.ended, facts["started"] - reply.started


def _first_with_ranks(num_ranks: Mapping[str, int]) -> str:
    return next((name for name, count in num_ranks.items() if count), next(iter(num_ranks)))


def _local_folders(facts: NodeFacts) -> dict[str, str]:
    return {name: folder["local"] for name, folder in facts["folders"].items() if folder["local"]}

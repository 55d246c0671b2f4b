"""`mcl doctor`: whether this machine, or all hosts of a hostfile, can train together; one table with remedies."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.cluster import doctor_checks, ssh
from launch.cluster.doctor_checks import FAIL, OK, Row
from launch.cluster.hostfile import Host, read_hostfile
from mcl_dist.errors import EXIT_FAILURE

if TYPE_CHECKING:
    from launch.run.config import PretrainConfig

LOOK_SECONDS = 90  # for one node's answer, slow stores included
STARTS_SECONDS = 60  # for Python and torch, from a cold network file system too
EXAMPLE = """example:
  mcl doctor
  mcl doctor --hostfile hosts --config configs/pretrain/kinetics400.yaml data.train=s3://bucket/train
"""
THIS = "this machine"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="look for what would keep nodes from training together",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hostfile", metavar="FILE", help="one `HOST slots=N` a line (default: this machine alone)")
    parser.add_argument("--config", help="also look at the stores, folders and ports of this configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. run.dir=runs/a")
    parser.add_argument(
        "--master-port", type=int, metavar="PORT", help="that the ranks will meet at, if not a free one"
    )
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for the nodes to meet (default: 20)")
    parser.add_argument("--json", action="store_true", help="the rows as a JSON list")
    ssh.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, print the table; 1 when any line fails."""
    hosts = read_hostfile(arguments.hostfile) if arguments.hostfile else None
    config = _config(arguments)
    examination = Diagnostics(hosts, ssh.from_arguments(arguments), config, arguments.master_port, arguments.timeout)
    rows = examination.rows()
    print(json.dumps([row._asdict() for row in rows], indent=1) if arguments.json else table(rows))
    return EXIT_FAILURE if any(row.state == FAIL for row in rows) else 0


def _config(arguments: argparse.Namespace) -> PretrainConfig | None:
    if not arguments.config and not arguments.overrides:
        return None
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    return load_config(PretrainConfig, arguments.config, arguments.overrides)


class Reply(NamedTuple):
    """What came back from a node: when it was asked and answered, by our clock, and why it may be nothing."""

    lines: list[dict[str, Any]]
    asked: float
    answered: float
    problem: str


class Diagnostics:
    """Asks every node at once, first of itself, then together with the others."""

    def __init__(
        self,
        hosts: Sequence[Host] | None,
        how: ssh.Ssh,
        config: PretrainConfig | None,
        master_port: int | None,
        seconds: float,
    ) -> None:
        self._hosts = {host.name: host for host in hosts or ()}
        self._names = list(self._hosts) or [THIS]
        self._ssh = how
        self._config = config
        self._master_port = master_port
        self._seconds = seconds
        self._nonce = uuid.uuid4().hex[:8]

    def rows(self) -> list[Row]:
        """The table, failing or not."""
        replies = self._ask("doctor_node.py", {name: self._request(name) for name in self._names}, LOOK_SECONDS)
        nodes = {name: reply.lines[0] for name, reply in replies.items() if reply.lines}
        rows = [self._unreached(name, reply) for name, reply in replies.items() if not reply.lines]
        if self._hosts and nodes:
            rows.append(Row("reached", ", ".join(nodes), OK, "by ssh"))
        if nodes:
            slots = {name: host.slots for name, host in self._hosts.items()}
            bounds = {name: _ahead(nodes[name], replies[name]) for name in nodes} if self._hosts else {}
            rows += doctor_checks.rows(nodes, slots, bounds)
            rows += self._together({name: facts for name, facts in nodes.items() if not facts["foreign"]})
        if self._config is None:
            rows.append(
                Row("configuration", "all", doctor_checks.NOTE, "no --config: no store, folder or port looked at")
            )
        return rows

    def _request(self, name: str) -> dict[str, Any]:
        request: dict[str, Any] = {"node": name, "nonce": self._nonce, "sets": [], "folders": {}}
        request["listeners"] = []
        if (config := self._config) is not None:
            request["sets"] = [*(part.url for part in config.data.all_sets), *config.evaluate.sets]
            folder = config.checkpoint.folder or f"{config.run.dir}/checkpoints"
            request["folders"] = {"run": config.run.dir, "checkpoints": folder}
            if config.data.cache:
                request["folders"]["cache"] = config.data.cache
            if config.monitoring.port is not None:
                slots = self._hosts[name].slots if self._hosts else None
                where = {"address": config.monitoring.address, "port": config.monitoring.port}
                request["listeners"].append({**where, "count": slots})
        if self._master_port is not None and name == self._names[0]:
            request["listeners"].append({"address": "0.0.0.0", "port": self._master_port, "count": 1})
        return request

    def _together(self, nodes: Mapping[str, dict[str, Any]]) -> list[Row]:
        """What only nodes together can tell: whether folders are shared, and what passes between them."""
        if not nodes:
            return []
        on_gpus = all(facts["gpus"] for facts in nodes.values() if not facts["torch_error"])
        ranks = {name: self._num_ranks(facts, on_gpus) for name, facts in nodes.items()}
        world = sum(ranks.values())
        first = next((name for name in nodes if ranks[name]), next(iter(nodes)))
        local = {name: _local_folders(facts) for name, facts in nodes.items()}
        requests = {
            name: {
                "folders": local[name],
                "nonce": self._nonce,
                "address": self._hosts[first].address if self._hosts else "127.0.0.1",
                "port": self._master_port or nodes[first]["free_port"],
                "ranks": ranks[name],
                "first_rank": sum(list(ranks.values())[:index]),
                "world": world,
                "on_gpus": on_gpus,
                "seconds": self._seconds,
            }
            for index, name in enumerate(nodes)
        }
        replies = self._ask("doctor_link.py", requests, 2 * self._seconds + STARTS_SECONDS)
        self._remove_traces(local)
        answers = {
            name: [line for line in reply.lines if "rank" in line] for name, reply in replies.items() if ranks[name]
        }
        rows = list(doctor_checks.link(answers, world, on_gpus)) if world else []
        if len(nodes) > 1:
            seen = {name: reply.lines[0]["seen"] for name, reply in replies.items() if reply.lines}
            names = {key: nodes[first]["folders"][key]["url"] for key in local[first]}
            rows = [*doctor_checks.shared(seen, names), *rows]
        return rows

    def _num_ranks(self, facts: Mapping[str, Any], on_gpus: bool) -> int:
        """How many ranks of a node meet the others: none where they could not import torch."""
        if facts["torch_error"]:
            return 0
        if on_gpus:
            return len(facts["gpus"])
        return 1 if self._hosts else 2

    def _remove_traces(self, local: Mapping[str, Mapping[str, str]]) -> None:
        commands = {
            name: shlex.join(
                ["rm", "-f", "--", *(f"{place}/.mcl-doctor-{self._nonce}-{name}" for place in set(places.values()))]
            )
            for name, places in local.items()
            if places
        }
        self._on_each(commands, {}, LOOK_SECONDS)

    def _ask(self, program: str, requests: Mapping[str, dict[str, Any]], seconds: float) -> dict[str, Reply]:
        path = str(Path(doctor_checks.__file__).with_name(program))
        # The far end has to end by itself when the connection breaks.
        command = ssh.here_but_there([path], seconds=seconds)
        return self._on_each(dict.fromkeys(requests, command), requests, seconds)

    def _on_each(
        self, commands: Mapping[str, str], inputs: Mapping[str, dict[str, Any]], seconds: float
    ) -> dict[str, Reply]:
        def one(name: str) -> Reply:
            words = self._ssh.command(name, commands[name]) if self._hosts else ["sh", "-c", commands[name]]
            return _reply(words, json.dumps(inputs.get(name, {})), seconds)

        with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
            return dict(zip(commands, pool.map(one, commands), strict=True))

    def _unreached(self, name: str, reply: Reply) -> Row:
        remedy = next((remedy for sign, remedy in REMEDIES if sign in reply.problem), REMEDIES[-1][1])
        return Row(
            "reached", name, FAIL, reply.problem, remedy.format(name=name, paths=f"{Path.cwd()}, {sys.executable}")
        )


REMEDIES = (
    ("Host key verification failed", "add its key to known_hosts: ssh-keyscan {name} (-p PORT), after checking it"),
    ("Permission denied", "authorise your key there (ssh-copy-id {name}), or name the right one with --ssh-key"),
    ("resolve", "give {name} an address in DNS, /etc/hosts or the ssh configuration"),
    ("No such file", "have this folder and this Python there too, at the same paths: {paths}"),
    ("not found", "have this folder and this Python there too, at the same paths: {paths}"),
    ("no answer within", "see what holds it up: a store or a mounted file system that does not answer"),
    ("", "check that it is up and its sshd reachable: ssh {name} true; --ssh-port, --ssh-config if it needs them"),
)


def _reply(words: Sequence[str], sent: str, seconds: float) -> Reply:
    """What a command answers that is killed there after so many seconds, and here when that does not come through."""
    asked, silent = time.time(), f"no answer within {seconds:.0f} s"
    limit = seconds + ssh.CONNECT_SECONDS
    try:
        result = subprocess.run(words, input=sent, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return Reply([], asked, time.time(), silent)
    answered = time.time()
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    said = [line for line in result.stderr.splitlines() if line.strip()]
    # Of a command that was killed there ssh says nothing, and has an exit code of its own.
    last_word = silent if answered - asked >= seconds else f"exit code {result.returncode}"
    return Reply(lines, asked, answered, said[-1] if said else last_word)


def _ahead(facts: Mapping[str, Any], reply: Reply) -> tuple[float, float]:
    """Bounds of how far a node's clock is ahead of ours: it began after we asked and ended before we heard of it."""
    return facts["ended"] - reply.answered, facts["started"] - reply.asked


def _local_folders(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: found["local"] for name, found in facts["folders"].items() if found["local"]}


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, a failing one with its remedy on the same line."""
    columns = [("check", *(row.check for row in rows)), ("node", *(row.node for row in rows))]
    columns += [("", *(row.state for row in rows)), ("found", *(_with_remedy(row) for row in rows))]
    widths = [max(map(len, column)) for column in columns[:-1]]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join((*map(str.ljust, line[:-1], widths), line[-1])).rstrip() for line in lines)


def _with_remedy(row: Row) -> str:
    return f"{row.found}; {row.remedy}" if row.remedy else row.found

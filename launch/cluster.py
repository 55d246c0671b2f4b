"""`mcl pretrain --hostfile`: the same command on every host, over pdsh or ssh, until the run is done.

Each host supervises its own ranks. What is left to do here is to hear of a host that failed or cannot be reached, to
end what is left of the attempt on all others, and to start again with the hosts that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from launch import ssh
from launch.ends import LOST, End
from launch.fleet import Fleet
from launch.hostfile import Host, read_hostfile
from launch.local_ranks import RESTARTED
from launch.nodes import DEFAULT_PORT
from launch.travel import travelling
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE, ConfigError, UserError

if TYPE_CHECKING:
    from launch.settings import PretrainConfig

GRACE_SECONDS = 5.0  # for the other hosts to end by themselves when one has failed
RETRY_SECONDS = 2.0  # between calls of a host that does not answer
# Ends all processes of a run by their ids: they have its name in their environment, and so has all that they started.
END_ALL = """for turn in 1 2 3 4 5; do left=; for p in /proc/[0-9]*; do
if tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx MCL_RUN={run}
then kill -KILL ${{p#/proc/}} 2>/dev/null; left=1; fi
done; [ -z "$left" ] && break; sleep 0.2; done; rm -rf {runtime}; echo ended"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `mcl pretrain` takes for many hosts."""
    group = parser.add_argument_group("many hosts")
    group.add_argument("--hostfile", metavar="FILE", help="train on these: one `HOST slots=N` a line")
    group.add_argument("--launcher", choices=("pdsh", "ssh"), help="how (default: pdsh where it is installed)")
    group.add_argument("--min-nodes", type=int, metavar="M", help="go on with as few hosts (default: all are needed)")
    group.add_argument(
        "--node-wait", type=float, default=600.0, metavar="SECONDS", help="for a host that does not answer (600)"
    )
    group.add_argument("--export", action="append", default=[], metavar="NAME", help="a variable the hosts get as well")
    ssh.add_arguments(group)


def run(arguments: argparse.Namespace) -> int:
    """Train on the hosts of a hostfile; returns the exit code."""
    from launch.settings import PretrainConfig
    from mcl_dist.config import load_config

    # The hostfile says all of this; either of two answers would be silently ignored.
    for option in ("ranks", "nodes", "node_rank", "master_addr"):
        if (given := getattr(arguments, option)) is not None:
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{name}: found {given} beside --hostfile, which says who trains; leave one of them out")
    hosts = read_hostfile(arguments.hostfile)
    if len({host.slots for host in hosts}) > 1:
        found = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
        raise ConfigError(f"{arguments.hostfile}: {found}: every host must have as many slots as the others")
    launcher = arguments.launcher or ("pdsh" if shutil.which("pdsh") else "ssh")
    if not shutil.which(launcher):
        raise ConfigError(f"--launcher: {launcher} is not installed here; install it, or choose the other")
    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    least = arguments.min_nodes or len(hosts)
    if not 1 <= least <= len(hosts):
        raise ConfigError(f"--min-nodes: found {least}, must be from 1 to the {len(hosts)} hosts of the hostfile")
    cluster = Cluster(
        hosts=hosts,
        config=config,
        words=["--config", arguments.config, *arguments.overrides],
        how=ssh.from_arguments(arguments),
        launcher=launcher,
        least=least,
        wait_seconds=arguments.node_wait,
        port=arguments.master_port or DEFAULT_PORT,
        environment=travelling(os.environ, arguments.export),
    )
    cluster.check(len(hosts))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda *_: cluster.ask_to_stop())
    return cluster.run()


@dataclass
class Cluster:
    """All attempts at a run on many hosts.

    Attributes:
        hosts: in the hostfile's order.
        config: resolved, of the run.
        words: of `mcl pretrain` that say what to train.
        how: hosts are reached.
        launcher: `pdsh` or `ssh`.
        least: hosts to go on with.
        wait_seconds: for hosts that do not answer.
        port: at which hosts meet on the first one.
        environment: what travels to the hosts.
    """

    hosts: Sequence[Host]
    config: PretrainConfig
    words: Sequence[str]
    how: ssh.Ssh
    launcher: str
    least: int
    wait_seconds: float
    port: int
    environment: Mapping[str, str]
    _name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask_to_stop(self) -> None:
        """All ranks are to save and leave."""
        self._stop.set()

    def check(self, num_hosts: int) -> None:
        """Whether so many hosts can train this configuration; ConfigError if not."""
        from launch.settings import check

        check(self.config, num_hosts * self.hosts[0].slots)

    def run(self) -> int:
        """Start, and start again, until the run is done, stopped, or beyond mending by itself."""
        restarts = self.config.supervise.restarts
        cause: End | None = None
        try:
            for attempt in range(restarts + 1):
                hosts = self._layout()
                if self._stop.is_set():
                    return EXIT_STOPPED
                codes, ends = self._attempt(hosts, attempt, cause)
                if (end := _final(codes)) is not None:
                    return end
                if self._stop.is_set():
                    return EXIT_STOPPED
                cause = _cause(codes, ends)
                _say(f"{cause.reason}; attempt {attempt + 1} of {restarts + 1} has failed")
            why = cause.reason if cause else "none was made"
            raise UserError(f"given up after {restarts} restarts: {why}; see the lines above, then start it again")
        finally:
            self._ended(self.hosts)

    def _attempt(self, hosts: Sequence[Host], attempt: int, cause: End | None) -> tuple[dict[str, int], dict[str, End]]:
        """Exit codes by host of those that ended before the attempt was over, and what was said of it there."""
        told = {"MCL_RUN": self._name, **self.environment}
        if cause:
            told[RESTARTED] = json.dumps({"cause": cause.cause, "reason": cause.reason, "attempt": attempt})
        commands = {host: self._command(rank, hosts, told) for rank, host in enumerate(hosts)}
        _say(f"training on {', '.join(host.name for host in hosts)}, by {self.launcher}")
        asked = False
        with Fleet(commands, self.launcher, self.how) as fleet:
            while not fleet.is_over():
                if self._stop.is_set() and not asked:
                    asked = True
                    self._tell_to_stop(hosts)
                if any(code not in (0, EXIT_STOPPED) for code in fleet.codes.values()):
                    fleet.wait(GRACE_SECONDS)
                    break
                fleet.wait_for_news(0.2)
            return dict(fleet.codes), dict(fleet.ends)

    def _command(self, rank: int, hosts: Sequence[Host], environment: Mapping[str, str]) -> str:
        words = ["-m", "mcl_dist", "pretrain", *self.words, "supervise.restarts=0", "--attached"]
        words += ["--ranks", str(hosts[0].slots), "--runtime", self._runtime(rank)]
        if len(hosts) > 1:
            words += ["--nodes", str(len(hosts)), "--node-rank", str(rank)]
            words += ["--master-addr", hosts[0].address, "--master-port", str(self.port)]
        settings = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items())])
        return ssh.here_but_there(words, before=settings)

    def _runtime(self, rank: int | str) -> str:
        return f"/tmp/mcl-{self._name}-{rank}"

    def _tell_to_stop(self, hosts: Sequence[Host]) -> None:
        """One host is enough: its ranks tell the others."""
        for rank, host in enumerate(hosts):
            if self._on(host, f"kill -TERM $(cat {self._runtime(rank)}/supervisor.pid) && echo told") == "told":
                return
        _say("no host takes the request to stop; it will be repeated by nobody")

    def _layout(self) -> Sequence[Host]:
        """The hosts to go on with: all, or after a while those that answer, as many as the batch allows."""
        deadline = time.monotonic() + self.wait_seconds
        there = self._ended(self.hosts)
        if len(there) < len(self.hosts):
            _say(f"waiting for {', '.join(host.name for host in self.hosts if host not in there)}; why: `mcl doctor`")
        while len(there) < len(self.hosts) and time.monotonic() < deadline and not self._stop.wait(RETRY_SECONDS):
            there += self._ended([host for host in self.hosts if host not in there])
        there = [host for host in self.hosts if host in there]
        if len(there) == len(self.hosts) or self._stop.is_set():
            return there
        missing = ", ".join(host.name for host in self.hosts if host not in there)
        for count in range(len(there), self.least - 1, -1):
            try:
                self.check(count)
            except ConfigError as error:
                _say(f"not on {count} hosts: {error}")
                continue
            _say(f"going on without {missing}, on {count} of {len(self.hosts)} hosts")
            return there[:count]
        raise UserError(
            f"{missing}: no answer for {self.wait_seconds:.0f} s, and {len(there)} hosts are too few; see `mcl doctor`"
        )

    def _ended(self, hosts: Sequence[Host]) -> list[Host]:
        """Those that answer, on which nothing of this run is left."""
        command = END_ALL.format(run=self._name, runtime=self._runtime("*"))
        answers: dict[Host, str] = {}

        def ask(host: Host) -> None:
            answers[host] = self._on(host, command)

        threads = [threading.Thread(target=ask, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [host for host in hosts if answers[host] == "ended"]

    def _on(self, host: Host, command: str) -> str:
        """What a short command says there; nothing where it cannot be run."""
        try:
            result = subprocess.run(
                self.how.command(host.name, command),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=3 * ssh.CONNECT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return ""
        return result.stdout.strip()


def _final(codes: Mapping[str, int]) -> int | None:
    """The exit code of the whole, if no other attempt could go better."""
    found = set(codes.values())
    for code in (EXIT_USAGE, EXIT_FAILURE):
        if code in found:
            return code
    if found <= {0, EXIT_STOPPED}:
        return EXIT_STOPPED if EXIT_STOPPED in found else 0
    return None


def _cause(codes: Mapping[str, int], ends: Mapping[str, End]) -> End:
    """Why an attempt failed: what a host's supervisor says of its ranks, unless a host was lost."""
    if ssh.UNREACHABLE not in codes.values():
        for name, end in ends.items():
            if end.may_be_mended and end.cause != LOST:
                return replace(end, reason=f"{name}: {end.reason}")
    told = ", ".join(f"{name} {_told(code)}" for name, code in codes.items() if code)
    return End(EXIT_FAILURE, LOST, told)


def _told(code: int) -> str:
    return "was lost" if code == ssh.UNREACHABLE else f"left with {code}"


def _say(text: str) -> None:
    print(f"mcl: {text}", file=sys.stderr, flush=True)

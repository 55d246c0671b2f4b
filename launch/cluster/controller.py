"""`mcl pretrain --hostfile`: the same command on every host, over pdsh or ssh, until the run is done.

Each host supervises its own ranks. What is left to do here is to hear of a host that failed or cannot be reached, to
end what is left of the attempt on all others, and to start again with the hosts that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from launch.cluster import ssh
from launch.cluster.environment import travelling
from launch.cluster.hostfile import Host, read_hostfile
from launch.cluster.remote_shell import RemoteShell
from launch.supervision.deepspeed_launcher import RESTARTED
from launch.supervision.node_discovery import DEFAULT_PORT
from launch.supervision.outcome import LOST, Outcome
from launch.supervision.policy import RestartPolicy
from mcl_dist.distributed.shutdown import EXIT_AT_ONCE, StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE, ConfigError, UserError

if TYPE_CHECKING:
    from launch.run.config import PretrainConfig

GRACE_SECONDS = 5.0  # for the other hosts to end by themselves when one has failed
RETRY_SECONDS = 2.0  # between calls of a host that does not answer, or cannot be asked to stop yet
LOOK_SECONDS = 0.2
STEP = re.compile(r'"step": (\d+)')  # of a rank's last sign of life
# Ends all processes of a run by their ids: they have its name in their environment, and so has all that they started.
# The ranks' signs of life are told before they go: of a host that was lost, nobody else says how far the run was.
END_ALL = """for turn in 1 2 3 4 5; do left=; for p in /proc/[0-9]*; do
if tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx MCL_RUN={run}
then kill -KILL ${{p#/proc/}} 2>/dev/null; left=1; fi
done; [ -z "$left" ] && break; sleep 0.2; done
grep -hos '"step": [0-9]*' {runtime}/attempt-*/rank-*.beat; rm -rf {runtime}; echo ended"""


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
    from launch.run.config import PretrainConfig
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
    cluster.stop.heed_signals()
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
        stop: asks all ranks to save and leave.
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
    stop: StopRequest = field(init=False)
    _name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _is_hurried: bool = False
    _farthest: int = 0

    def __post_init__(self) -> None:
        self.stop = StopRequest(at_once=self._hurry)

    def check(self, num_hosts: int) -> None:
        """Whether so many hosts can train this configuration; ConfigError if not."""
        from launch.run.config import check

        check(self.config, num_hosts * self.hosts[0].slots)

    def run(self) -> int:
        """Start, and start again, until the run is done, stopped, or beyond mending by itself."""
        try:
            return self._attempts()
        finally:
            self._ended(self.hosts)

    def _attempts(self) -> int:
        limits = self.config.supervise
        restarts = RestartPolicy(limits.restarts, limits.progress_steps)
        cause: Outcome | None = None
        there = self._ended(self.hosts)
        while True:
            hosts = self._layout(there)
            if (code := self._over({})) is not None:
                return code
            codes, ends = self._attempt(hosts, restarts.in_a_row, cause)
            if (code := self._over(codes)) is not None:
                return code
            cause = _cause(codes, ends)
            there = self._ended(self.hosts)
            if not restarts.allow(self._farthest):
                after = f"given up after {limits.restarts} restarts without progress"
                raise UserError(f"{after}: {cause.reason}; see the lines above, then start it again")
            again = f"restart {restarts.in_a_row} of {limits.restarts}"
            _say(f"{cause.reason}; starting again from the newest checkpoint ({again})")
            self._is_asked_within(restarts.pause)

    def _over(self, codes: Mapping[str, int]) -> int | None:
        """The exit code of the whole, if there is to be no other attempt."""
        if self._is_hurried:
            return EXIT_AT_ONCE
        if (end := _final(codes)) is not None:
            return end
        return EXIT_STOPPED if self.stop.is_asked else None

    def _attempt(
        self, hosts: Sequence[Host], restart: int, cause: Outcome | None
    ) -> tuple[dict[str, int], dict[str, Outcome]]:
        """Exit codes by host of those that ended before the attempt was over, and what was said of it there."""
        told = {"MCL_RUN": self._name, **self.environment}
        if cause:
            told[RESTARTED] = json.dumps({"cause": cause.cause, "reason": cause.reason, "attempt": restart})
        _say(f"training on {', '.join(host.name for host in hosts)}, by {self.launcher}")
        unasked = {host: node for node, host in enumerate(hosts)}
        ask_at = 0.0
        with RemoteShell(hosts, self._command(hosts, told), self.launcher, self.how) as fleet:
            while not fleet.is_over() and not self._is_hurried:
                unasked = {host: node for host, node in unasked.items() if host.name not in fleet.codes}
                if self.stop.is_asked and unasked and time.monotonic() >= ask_at:
                    unasked = self._unasked(unasked)
                    ask_at = time.monotonic() + RETRY_SECONDS
                if any(code not in (0, EXIT_STOPPED) for code in fleet.codes.values()):
                    fleet.wait(GRACE_SECONDS)
                    break
                fleet.wait_for_news(LOOK_SECONDS)
            return dict(fleet.codes), dict(fleet.ends)

    def _command(self, hosts: Sequence[Host], environment: Mapping[str, str]) -> str:
        """What every host runs; the shell's variable `node` makes the difference."""
        words = ["-m", "mcl_dist", "pretrain", *self.words, "supervise.restarts=0", "--attached"]
        words += ["--ranks", str(hosts[0].slots)]
        own = f"--runtime {self._runtime('$node')}"
        if len(hosts) > 1:
            words += ["--nodes", str(len(hosts)), "--master-addr", hosts[0].address, "--master-port", str(self.port)]
            own += " --node-rank $node"
        settings = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items())])
        return f"{ssh.here_but_there(words, before=settings)} {own}"

    def _runtime(self, node: int | str) -> str:
        return f"/tmp/mcl-{self._name}-{node}"

    def _unasked(self, hosts: Mapping[Host, int]) -> dict[Host, int]:
        """Ask these, each a node of the attempt, to save and leave; returns those that take no request yet.

        Ranks would tell the ranks of other hosts, but a supervisor that has none yet tells nobody.
        """
        _say(f"asking {', '.join(host.name for host in hosts)} to save and leave")
        kill = "kill -TERM $(cat {}/supervisor.pid) && echo told"
        answers = self._answers({host: kill.format(self._runtime(node)) for host, node in hosts.items()})
        return {host: node for host, node in hosts.items() if answers[host] != "told"}

    def _hurry(self) -> None:
        self._is_hurried = True

    def _is_asked_within(self, seconds: float) -> bool:
        """Wait for so long, or until this run is asked to stop."""
        deadline = time.monotonic() + seconds
        while not self.stop.is_asked and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return self.stop.is_asked

    def _layout(self, there: Sequence[Host]) -> Sequence[Host]:
        """The hosts to go on with: all, or after a while those that answer, as many as the batch allows."""
        deadline = time.monotonic() + self.wait_seconds
        if len(there) < len(self.hosts):
            _say(f"waiting for {', '.join(host.name for host in self.hosts if host not in there)}; why: `mcl doctor`")
        while len(there) < len(self.hosts) and time.monotonic() < deadline and not self._is_asked_within(RETRY_SECONDS):
            there = [*there, *self._ended([host for host in self.hosts if host not in there])]
        there = [host for host in self.hosts if host in there]
        if len(there) == len(self.hosts) or self.stop.is_asked:
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
        """Those that answer, on which nothing of this run is left; how far the run was is kept."""
        command = END_ALL.format(run=self._name, runtime=self._runtime("*"))
        answers = self._answers(dict.fromkeys(hosts, command))
        steps = [int(step) for answer in answers.values() for step in STEP.findall(answer)]
        self._farthest = max([self._farthest, *steps])
        return [host for host in hosts if answers[host].endswith("ended")]

    def _answers(self, commands: Mapping[Host, str]) -> dict[Host, str]:
        """What short commands say, a host each and all at once."""
        with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
            return dict(zip(commands, pool.map(self._on, commands, commands.values()), strict=True))

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
                start_new_session=True,  # a terminal's signals are for us
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
    if found and found <= {0, EXIT_STOPPED}:
        return EXIT_STOPPED if EXIT_STOPPED in found else 0
    return None


def _cause(codes: Mapping[str, int], ends: Mapping[str, Outcome]) -> Outcome:
    """Why an attempt failed: what a host's supervisor says of its ranks, unless a host was lost."""
    if ssh.UNREACHABLE not in codes.values():
        for name, end in ends.items():
            if end.may_be_mended and end.cause != LOST:
                return replace(end, reason=f"{name}: {end.reason}")
    told = ", ".join(f"{name} {_told(code)}" for name, code in codes.items() if code)
    return Outcome(EXIT_FAILURE, LOST, told)


def _told(code: int) -> str:
    return "was lost" if code == ssh.UNREACHABLE else f"left with {code}"


def _say(text: str) -> None:
    with suppress(OSError):  # of a terminal that was closed
        print(f"mcl: {text}", file=sys.stderr, flush=True)

"""The controller of a run on many hosts.

It runs `mcl pretrain --attached` on every host, over pdsh or ssh; each of them supervises its host's ranks. When a host
fails or cannot be reached, the controller kills the rest of the attempt and restarts the run on the hosts that answer.
"""

import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.cluster.hostfile import Host
from launch.cluster.remote_shell import RemoteShell
from launch.cluster.ssh import CONNECT_SECONDS, UNREACHABLE, Ssh, remote_command, run_all
from launch.supervision.deepspeed_launcher import restart_environment
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.messages import log
from launch.supervision.outcome import DONE, LOST, STOPPED, USER, Outcome
from launch.supervision.policy import AttemptResult, RestartPolicy, run_with_restarts
from launch.supervision.processes import wait_until
from mcl_dist.distributed.shutdown import EXIT_INTERRUPTED, StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE, ConfigError, UserError

GRACE_SECONDS = 5.0  # for the other hosts to end by themselves when one has failed
RETRY_SECONDS = 2.0  # between calls of a host that does not answer or cannot take a stop request yet
POLL_SECONDS = 0.2
STEP = re.compile(r'"step": (\d+)')  # in a rank's last heartbeat
# Kills all processes of a run: they and their children have its id in their environment. Prints the steps of the ranks'
# heartbeats before it removes them: they are the only record of the progress on a host that was lost.
KILL_SCRIPT = """for try in 1 2 3 4 5; do left=; for p in /proc/[0-9]*; do
if tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx MCL_RUN={run}
then kill -KILL ${{p#/proc/}} 2>/dev/null; left=1; fi
done; [ -z "$left" ] && break; sleep 0.2; done
grep -hos '"step": [0-9]*' {runtime}/attempt-*/rank-*.beat; rm -rf {runtime}; echo ended"""
STOP_SCRIPT = "kill -TERM $(cat {runtime}/supervisor.pid) && echo requested"


@dataclass
class Controller:
    """All attempts at a run on many hosts.

    Attributes:
        hosts: in the hostfile's order.
        check_num_ranks: raises ConfigError if the run's configuration does not fit so many ranks.
        arguments: of `mcl pretrain` on every host: configuration and overrides.
        launcher: `pdsh` or `ssh`.
        min_hosts: to continue with.
        wait_seconds: for hosts that do not answer.
        port: of the rendezvous on the first host.
    """

    hosts: Sequence[Host]
    limits: SuperviseConfig
    check_num_ranks: Callable[[int], None]
    arguments: Sequence[str]
    ssh: Ssh
    launcher: str
    min_hosts: int
    wait_seconds: float
    port: int
    environment: Mapping[str, str]
    _run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _is_interrupted: bool = False
    _max_step: int = 0
    _available: Sequence[Host] = ()
    _stop: StopRequest = field(init=False)
    _policy: RestartPolicy = field(init=False)

    def __post_init__(self) -> None:
        self._stop = StopRequest(on_second_interrupt=self._interrupt)
        self._policy = RestartPolicy(self.limits.restarts, self.limits.progress_steps)

    def run(self) -> int:
        """Run attempts until the run ends; returns the exit code.

        Raises:
            ConfigError: the configuration does not fit the hosts.
            UserError: no restart is left, or too few hosts answer.
        """
        self.check_num_ranks(len(self.hosts) * self.hosts[0].slots)
        self._stop.handle_signals()
        try:
            self._available = self._kill_run(self.hosts)
            outcome = run_with_restarts(self._policy, self._attempt, self._wait_for_stop)
        finally:
            self._kill_run(self.hosts)
        if outcome.is_retryable:
            problem = f"given up after {self.limits.restarts} restarts without progress: {outcome.reason}"
            raise UserError(f"{problem}; see the messages above, then start it again")
        return outcome.exit_code

    def _attempt(self, cause: Outcome | None) -> AttemptResult:
        hosts = self._choose_hosts(self._available)
        if outcome := self._final_outcome({}):
            return AttemptResult(outcome, self._max_step)
        exit_codes, outcomes = self._run_on(hosts, cause)
        if outcome := self._final_outcome(exit_codes):
            return AttemptResult(outcome, self._max_step)
        self._available = self._kill_run(self.hosts)
        return AttemptResult(failure_cause(exit_codes, outcomes), self._max_step)

    def _final_outcome(self, exit_codes: Mapping[str, int]) -> Outcome | None:
        """The outcome of the run; None if another attempt can succeed."""
        if self._is_interrupted:
            return Outcome(EXIT_INTERRUPTED, STOPPED, "interrupted twice")
        codes = set(exit_codes.values())
        for code in (EXIT_USAGE, EXIT_FAILURE):
            if code in codes:
                return Outcome(code, USER, f"a host exited with code {code}")
        if codes == {0}:
            return Outcome(0, DONE, "all is done")
        is_stopped = bool(codes) and codes <= {0, EXIT_STOPPED}
        return Outcome(EXIT_STOPPED, STOPPED, "asked to stop") if is_stopped or self._stop.is_requested else None

    def _run_on(self, hosts: Sequence[Host], cause: Outcome | None) -> tuple[dict[str, int], dict[str, Outcome]]:
        """Run one attempt; returns the exit codes and outcomes of the hosts that ended by themselves, by name."""
        restart = restart_environment(cause, self._policy.num_restarts)
        environment = {"MCL_RUN": self._run_id, **self.environment, **restart}
        log(f"training on {_names(hosts)} over {self.launcher}")
        to_stop = {host: node for node, host in enumerate(hosts)}
        next_request = 0.0
        with RemoteShell(hosts, self._command(hosts, environment), self.launcher, self.ssh) as shell:
            while not shell.has_ended() and not self._is_interrupted:
                to_stop = {host: node for host, node in to_stop.items() if host.name not in shell.exit_codes}
                if self._stop.is_requested and to_stop and time.monotonic() >= next_request:
                    to_stop = self._request_stop(to_stop)
                    next_request = time.monotonic() + RETRY_SECONDS
                if any(code not in (0, EXIT_STOPPED) for code in shell.exit_codes.values()):
                    shell.wait(GRACE_SECONDS)
                    break
                shell.wait_for_event(POLL_SECONDS)
            return dict(shell.exit_codes), dict(shell.outcomes)

    def _command(self, hosts: Sequence[Host], environment: Mapping[str, str]) -> str:
        """The command of every host; the shell's variable `node` is the host's number."""
        arguments = ["-m", "mcl_dist", "pretrain", *self.arguments, "supervise.restarts=0", "--attached"]
        arguments += ["--ranks", str(hosts[0].slots)]
        options = f"--runtime {self._runtime('$node')}"
        if len(hosts) > 1:
            arguments += ["--nodes", str(len(hosts))]
            arguments += ["--master-addr", hosts[0].address, "--master-port", str(self.port)]
            options += " --node-rank $node"
        variables = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items())])
        return f"{remote_command(arguments, prefix=variables)} {options}"

    def _runtime(self, node: int | str) -> str:
        return f"/tmp/mcl-{self._run_id}-{node}"

    def _request_stop(self, hosts: Mapping[Host, int]) -> dict[Host, int]:
        """Send a stop request to these hosts; returns those that cannot take it yet.

        Running ranks pass a request on to the ranks of other hosts, but a host without ranks cannot.
        """
        log(f"stopping {_names(hosts)} after a last checkpoint")
        scripts = {host: STOP_SCRIPT.format(runtime=self._runtime(node)) for host, node in hosts.items()}
        answers = self._ask(scripts)
        return {host: node for host, node in hosts.items() if answers[host] != "requested"}

    def _interrupt(self) -> None:
        self._is_interrupted = True

    def _wait_for_stop(self, seconds: float) -> bool:
        return wait_until(lambda: self._stop.is_requested, seconds, POLL_SECONDS)

    def _choose_hosts(self, available: Sequence[Host]) -> Sequence[Host]:
        """All hosts; after `wait_seconds`, those that answer, limited to a number that fits the batch."""
        deadline = time.monotonic() + self.wait_seconds
        if missing := self._without(available):
            log(f"waiting for {_names(missing)}; `mcl doctor` finds out why")
        while missing and time.monotonic() < deadline and not self._wait_for_stop(RETRY_SECONDS):
            available = [*available, *self._kill_run(missing)]
            missing = self._without(available)
        available = [host for host in self.hosts if host in available]
        if not missing or self._stop.is_requested:
            return available
        for count in range(len(available), self.min_hosts - 1, -1):
            try:
                self.check_num_ranks(count * self.hosts[0].slots)
            except ConfigError as error:
                log(f"not on {count} hosts: {error}")
                continue
            log(f"continuing without {_names(missing)}, on {count} of {len(self.hosts)} hosts")
            return available[:count]
        problem = f"no answer for {self.wait_seconds:.0f} s, and {len(available)} hosts are too few"
        raise UserError(f"{_names(missing)}: {problem}; see `mcl doctor`")

    def _without(self, available: Sequence[Host]) -> list[Host]:
        return [host for host in self.hosts if host not in available]

    def _kill_run(self, hosts: Sequence[Host]) -> list[Host]:
        """Kill what is left of this run on these hosts and record its progress; returns the hosts that answer."""
        script = KILL_SCRIPT.format(run=self._run_id, runtime=self._runtime("*"))
        answers = self._ask(dict.fromkeys(hosts, script))
        steps = [int(step) for answer in answers.values() for step in STEP.findall(answer)]
        self._max_step = max([self._max_step, *steps])
        return [host for host in hosts if answers[host].endswith("ended")]

    def _ask(self, scripts: Mapping[Host, str]) -> dict[Host, str]:
        """Output of short shell scripts, one for each host; "" from a host that cannot run it."""
        commands = {host: self.ssh.command(host.name, script) for host, script in scripts.items()}
        replies = run_all(commands, 3 * CONNECT_SECONDS, new_session=True)
        return {host: reply.stdout.strip() for host, reply in replies.items()}


def failure_cause(exit_codes: Mapping[str, int], outcomes: Mapping[str, Outcome]) -> Outcome:
    """Why an attempt failed: a lost host, or else the first outcome of a host that is not a consequence of another."""
    if UNREACHABLE not in exit_codes.values():
        for name, outcome in outcomes.items():
            if outcome.is_retryable and outcome.cause != LOST:
                return replace(outcome, reason=f"{name}: {outcome.reason}")
    failures = (
        f"{name} was lost" if code == UNREACHABLE else f"{name} exited with code {code}"
        for name, code in exit_codes.items()
        if code
    )
    return Outcome(EXIT_FAILURE, LOST, ", ".join(failures))


def _names(hosts: Iterable[Host]) -> str:
    return ", ".join(host.name for host in hosts)

"""The supervisor of a node: starts its ranks, watches them, and restarts them from the newest checkpoint."""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from launch.supervision.attempt import Attempt
from launch.supervision.deepspeed_launcher import (
    RUNTIME,
    STOP_FILE,
    NodeSpec,
    launcher_command,
    launcher_environment,
    restart_environment,
)
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.messages import log, print_safely
from launch.supervision.outcome import LOST, OUTCOME_LINE, STOPPED, Outcome
from launch.supervision.policy import AttemptResult, RestartPolicy, run_with_restarts
from launch.supervision.processes import wait_until
from launch.supervision.rendezvous import RendezvousClient, RendezvousServer
from mcl_dist.distributed.shutdown import EXIT_INTERRUPTED, StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED
from mcl_dist.events import Failed
from mcl_dist.run_log.listeners import EventLog

EXIT_RETRYABLE = 76  # of a node with --attached: it failed, and another attempt can succeed
PID_FILE, OUTCOME_FILE = "supervisor.pid", "outcome.json"
POLL_SECONDS = 0.2
REPORT_SECONDS = 30.0  # between messages that list the missing nodes


@dataclass
class Supervisor:
    """All attempts at a run, on this node.

    Attributes:
        script, arguments: command of a rank.
        node_spec: this node's place in the run.
        limits: of hangs and restarts.
        runtime: local folder of the ranks' heartbeats and outcomes, and of a stop file.
        event_log: the run's `log.jsonl`.
        rendezvous: connection to node 0; None if there is one node.
        attached: whether the end of standard input requests a stop: the parent command is gone.
    """

    script: str
    arguments: Sequence[str]
    node_spec: NodeSpec
    limits: SuperviseConfig
    runtime: Path
    event_log: Path
    rendezvous: RendezvousClient | None = None
    attached: bool = False
    _num_attempts: int = 0
    _is_interrupted: bool = False
    _stop: StopRequest = field(init=False)
    _policy: RestartPolicy = field(init=False)

    def __post_init__(self) -> None:
        self._stop = StopRequest(on_second_interrupt=self._interrupt)
        self._policy = RestartPolicy(self.limits.restarts, self.limits.progress_steps)

    def run(self) -> Outcome:
        """Run attempts until the run ends; log a failure that restarts cannot repair."""
        self._stop.handle_signals()
        outcome = run_with_restarts(self._policy, self._attempt, self._wait_for_stop)
        if outcome.is_retryable:
            log(f"{outcome.reason}; given up after {self.limits.restarts} restarts without progress")
            if self.node_spec.node_rank == 0:
                EventLog(self.event_log)(Failed(outcome.reason))
        return outcome

    def _attempt(self, cause: Outcome | None) -> AttemptResult:
        node_spec = self._join()
        if isinstance(node_spec, Outcome):
            return AttemptResult(node_spec, 0, is_final=True)
        if cause and cause.cause == LOST and self.rendezvous and self.rendezvous.root_cause:
            cause = self.rendezvous.root_cause  # this node has only lost the others; another node knows why
        outcome, step = self._run_ranks(node_spec, cause)
        if self._stop.is_requested and outcome.is_retryable:
            log(f"{outcome.reason}, before a checkpoint was complete; the run resumes from the one before")
            outcome = Outcome(EXIT_STOPPED, STOPPED, f"asked to stop; {outcome.reason}")
        return AttemptResult(outcome, step)

    def _join(self) -> NodeSpec | Outcome:
        """Wait until all nodes are ready; returns where the ranks meet, or why there is no attempt."""
        self._poll_stop_requests()
        deadline, reported_at = time.monotonic() + self.limits.join_seconds, time.monotonic()
        if self.rendezvous:
            self.rendezvous.set_ready()
        while not self._stop.is_requested:
            if not self.rendezvous:
                return self.node_spec
            if outcome := self.rendezvous.final_outcome:
                return outcome
            if port := self.rendezvous.join_attempt():
                return replace(self.node_spec, port=port)
            waiting = f"at {self.node_spec.address}:{self.node_spec.port} for nodes {self.rendezvous.missing}"
            if time.monotonic() > deadline:
                return Outcome(EXIT_FAILURE, LOST, f"waited {self.limits.join_seconds:.0f} s {waiting}")
            if time.monotonic() - reported_at > REPORT_SECONDS:
                reported_at = time.monotonic()
                log(f"waiting {waiting}")
            time.sleep(POLL_SECONDS)
            self._poll_stop_requests()
        return Outcome(EXIT_STOPPED, STOPPED, "asked to stop between two attempts")

    def _run_ranks(self, node_spec: NodeSpec, cause: Outcome | None) -> tuple[Outcome, int]:
        """Run one attempt; returns its outcome and the steps done."""
        self._num_attempts += 1
        folder = self.runtime / f"attempt-{self._num_attempts}"
        folder.mkdir(parents=True)
        variables = {RUNTIME: str(folder), **restart_environment(cause, self._policy.num_restarts)}
        command = launcher_command(self.script, self.arguments, node_spec)
        attempt = Attempt.start(command, launcher_environment(variables), folder, node_spec.num_ranks, self.limits)
        try:
            outcome = self._watch(attempt)
        finally:
            attempt.kill()
        if self.rendezvous:
            self.rendezvous.report_outcome(outcome)
        return outcome, attempt.step

    def _watch(self, attempt: Attempt) -> Outcome:
        while True:
            self._poll_stop_requests()
            if self._is_interrupted:
                return Outcome(EXIT_INTERRUPTED, STOPPED, "interrupted twice")
            if self._stop.is_requested:
                attempt.request_stop(signal.Signals.__members__.get(self._stop.reason or "", signal.SIGUSR1))
            others_in_slow_phase = bool(self.rendezvous and self.rendezvous.any_in_slow_phase)
            outcome = attempt.poll(others_in_slow_phase=others_in_slow_phase)
            if outcome is None and self.rendezvous:
                self.rendezvous.report_phase(in_slow_phase=attempt.in_slow_phase())
                outcome = self.rendezvous.failure_elsewhere()
            if outcome:
                return outcome
            time.sleep(POLL_SECONDS)

    def _poll_stop_requests(self) -> None:
        """Check for a stop file and for the end of standard input; signals arrive by themselves."""
        file = self.runtime / STOP_FILE
        if file.exists():
            file.unlink(missing_ok=True)
            self._stop.request("a stop file")
        if self.attached and select.select([sys.stdin], [], [], 0)[0] and not os.read(sys.stdin.fileno(), 4096):
            self.attached = False
            self._stop.request("the end of standard input")

    def _wait_for_stop(self, seconds: float) -> None:
        wait_until(lambda: self._stop.is_requested, seconds, POLL_SECONDS)

    def _interrupt(self) -> None:
        self._is_interrupted = True


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
    """Run a `Supervisor` until the run ends, by default in a temporary `runtime` folder; returns the exit code.

    The cluster controller sets `attached`, which also prints the outcome.
    """
    with ExitStack() as stack:
        folder = Path(runtime or stack.enter_context(TemporaryDirectory(prefix="mcl-")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PID_FILE).write_text(str(os.getpid()))
        rendezvous = _join_rendezvous(node_spec, limits.node_seconds, stack) if node_spec.num_nodes > 1 else None
        supervisor = Supervisor(str(script), arguments, node_spec, limits, folder, event_log, rendezvous, attached)
        outcome = supervisor.run()
        text = json.dumps({**asdict(outcome), "retry": outcome.is_retryable, "node": node_spec.node_rank})
        (folder / OUTCOME_FILE).write_text(text)
        if attached:
            print_safely(f"{OUTCOME_LINE} {text}", sys.stdout)
    return EXIT_RETRYABLE if attached and outcome.is_retryable else outcome.exit_code


def _join_rendezvous(spec: NodeSpec, timeout_seconds: float, stack: ExitStack) -> RendezvousClient:
    """Connect to node 0, where the server is started first; the stack closes both."""
    if spec.node_rank == 0:
        stack.callback(RendezvousServer(spec.port, spec.num_nodes, timeout_seconds).close)
    client = RendezvousClient(spec.address, spec.port, spec.node_rank, spec.num_nodes, timeout_seconds)
    stack.callback(client.close)
    return client

"""A node's supervisor: starts the ranks, watches them, and starts them again from the newest checkpoint."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.supervision.attempt import Attempt
from launch.supervision.deepspeed_launcher import (
    RESTARTED,
    RUNTIME,
    STOP_FILE,
    NodeSpec,
    launcher_command,
    launcher_environment,
)
from launch.supervision.hang_detection import SuperviseConfig
from launch.supervision.outcome import LOST, STOPPED, Outcome
from launch.supervision.policy import RestartPolicy
from launch.supervision.rendezvous import RendezvousClient
from mcl_dist.distributed.shutdown import EXIT_AT_ONCE, StopRequest
from mcl_dist.errors import EXIT_FAILURE, EXIT_STOPPED
from mcl_dist.events import Failed
from mcl_dist.run_log.listeners import EventLog

LOOK_SECONDS = 0.2
TOLD_SECONDS = 30.0  # between lines that say which nodes are missing


@dataclass
class Supervisor:
    """All attempts at a run, as far as they happen on this node.

    Attributes:
        script, words: what a rank runs.
        meeting: which of the nodes this is.
        limits: when to end and restart.
        runtime: folder on this machine for beats and words of ranks, and for a file that asks to stop.
        log: the run's `log.jsonl`.
        member: this node's tie to the others, where there are any.
        attached: whether the end of standard input is a request to stop: whoever gave this command is gone.
    """

    script: str
    words: Sequence[str]
    meeting: NodeSpec
    limits: SuperviseConfig
    runtime: Path
    log: Path
    member: RendezvousClient | None = None
    attached: bool = False
    _number: int = 0
    _is_hurried: bool = False
    _stop: StopRequest = field(init=False)
    _restarts: RestartPolicy = field(init=False)

    def __post_init__(self) -> None:
        self._stop = StopRequest(at_once=self._hurry)
        self._restarts = RestartPolicy(self.limits.restarts, self.limits.progress_steps)

    def run(self) -> Outcome:
        """See the run through to its end, which is told."""
        self._stop.heed_signals()
        end = self._attempts()
        if end.may_be_mended:
            self._say(f"{end.reason}; after {self.limits.restarts} restarts without progress, this run is given up")
            if self.meeting.node == 0:
                EventLog(self.log)(Failed(end.reason))
        return end

    def _attempts(self) -> Outcome:
        cause: Outcome | None = None
        while True:
            meeting = self._joined()
            if isinstance(meeting, Outcome):
                return meeting
            if cause and cause.cause == LOST and self.member and self.member.before:
                cause = self.member.before  # what this node could but miss, another has seen
            end, step = self._attempt(meeting, cause)
            if self._stop.is_asked and end.may_be_mended:
                self._say(f"{end.reason}, before all was saved; the run will go on from its newest checkpoint")
                return Outcome(EXIT_STOPPED, STOPPED, f"asked to stop; {end.reason}")
            if not end.may_be_mended or not self._restarts.allow(step):
                return end
            again = f"restart {self._restarts.in_a_row} of {self.limits.restarts}"
            self._say(f"{end.reason}; starting again from the newest checkpoint ({again})")
            self._wait(self._restarts.pause, lambda: self._stop.is_asked)
            cause = end

    def _joined(self) -> NodeSpec | Outcome:
        """Where this attempt's ranks meet, once all nodes are ready; or why there will be no attempt."""
        self._look()
        deadline, told = time.monotonic() + self.limits.join_seconds, time.monotonic()
        if self.member:
            self.member.ready()
        while not self._stop.is_asked:
            if not self.member:
                return self.meeting
            if end := self.member.over():
                return end
            if port := self.member.begun():
                return replace(self.meeting, port=port)
            where = f"{self.meeting.address}:{self.meeting.port}"
            if time.monotonic() > deadline:
                waited = f"for {self.limits.join_seconds:.0f} s"
                return Outcome(EXIT_FAILURE, LOST, f"nodes {self.member.missing} did not come to {where} {waited}")
            if time.monotonic() - told > TOLD_SECONDS:
                told = time.monotonic()
                self._say(f"waiting at {where} for nodes {self.member.missing}")
            time.sleep(LOOK_SECONDS)
            self._look()
        return Outcome(EXIT_STOPPED, STOPPED, "asked to stop between two attempts")

    def _attempt(self, meeting: NodeSpec, cause: Outcome | None) -> tuple[Outcome, int]:
        """How an attempt ended, and the steps that were done then."""
        self._number += 1
        folder = self.runtime / f"attempt-{self._number}"
        folder.mkdir(parents=True)
        more = {RUNTIME: str(folder)}
        if cause:
            more[RESTARTED] = json.dumps(
                {"cause": cause.cause, "reason": cause.reason, "attempt": self._restarts.in_a_row}
            )
        command = launcher_command(self.script, self.words, meeting)
        attempt = Attempt.start(command, launcher_environment(more), folder, meeting.num_ranks, self.limits)
        try:
            end = self._watch(attempt)
        finally:
            attempt.kill()
        if self.member:
            self.member.ended(end)
        return end, attempt.step

    def _watch(self, attempt: Attempt) -> Outcome:
        while True:
            self._look()
            if self._is_hurried:
                return Outcome(EXIT_AT_ONCE, STOPPED, "interrupted twice")
            if self._stop.is_asked:
                number = signal.Signals.__members__.get(self._stop.reason or "", signal.SIGUSR1)
                attempt.ask_to_stop(number)
            if end := attempt.ended(others_pause=bool(self.member and self.member.others_pause)):
                return end
            if self.member and (end := self.member.news(pauses=attempt.is_pausing())):
                return end
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Look for requests to stop that are no signals."""
        file = self.runtime / STOP_FILE
        if file.exists():
            file.unlink(missing_ok=True)
            self._stop.ask("a stop file")
        if self.attached and select.select([sys.stdin], [], [], 0)[0] and not os.read(sys.stdin.fileno(), 4096):
            self.attached = False
            self._stop.ask("the end of standard input")

    def _hurry(self) -> None:
        self._is_hurried = True

    @staticmethod
    def _wait(seconds: float, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):  # of a terminal that was closed
            print(f"mcl: {text}", file=sys.stderr, flush=True)

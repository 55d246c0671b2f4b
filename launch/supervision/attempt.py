"""One attempt at a run: the launcher and this node's ranks, watched until all of them have ended."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.supervision.hang_detection import SuperviseConfig, any_in_slow_phase, find_hang
from launch.supervision.outcome import DONE, HUNG, STOPPED, Outcome, attempt_outcome, read_outcomes
from launch.supervision.processes import is_gone, kill_session, send_signal, wait_until
from mcl_dist.distributed.heartbeat import Beat, read_beats
from mcl_dist.errors import EXIT_FAILURE, UserError

OUTCOME_SECONDS = 2.0  # for the other ranks to write their outcomes after one is gone
EXIT_CODE_SECONDS = 3.0  # for the launcher to exit with the code of the failed rank


@dataclass
class Attempt:
    """The launcher in its own session, with all its ranks, which write heartbeats and outcomes to the folder."""

    launcher: subprocess.Popen[bytes]
    folder: Path
    num_ranks: int
    limits: SuperviseConfig
    _signalled: set[int] = field(default_factory=set)
    _started_at: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, command: Sequence[str], environment: dict[str, str], folder: Path, num_ranks: int, limits: SuperviseConfig
    ) -> Attempt:
        """Start the launcher, out of reach of a terminal's signals."""
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(launcher, folder, num_ranks, limits)

    @property
    def step(self) -> int:
        """Steps done."""
        return max((beat.step for beat in read_beats(self.folder)), default=0)

    def request_stop(self, number: signal.Signals) -> None:
        """Send a signal, once, to every rank that has started."""
        for beat in read_beats(self.folder):
            if beat.rank not in self._signalled and send_signal(beat.pid, self.launcher.pid, number):
                self._signalled.add(beat.rank)

    def in_slow_phase(self) -> bool:
        """Whether a rank of this node is in a slow phase or has not started."""
        beats = self._running(read_beats(self.folder))
        return len(beats) < self.num_ranks or any_in_slow_phase(beats)

    def poll(self, *, others_in_slow_phase: bool = False) -> Outcome | None:
        """The outcome if the attempt has ended or hangs, with all its processes gone; None while it runs."""
        beats = read_beats(self.folder)
        running = self._running(beats)
        if self._launcher_is_gone() or self._has_failed_rank(beats, running):
            return self._collect_outcome()
        now = time.monotonic()
        reason = find_hang(running, self.limits, now, others_in_slow_phase=others_in_slow_phase)
        if reason is None and len(beats) < self.num_ranks and now - self._started_at > self.limits.pause_seconds:
            reason = f"{self.num_ranks - len(beats)} ranks have not started within {now - self._started_at:.0f} s"
        if reason is None:
            return None
        self.kill()
        return Outcome(EXIT_FAILURE, HUNG, reason)

    def kill(self) -> None:
        """Kill the launcher and all ranks.

        Raises:
            UserError: some processes survive.
        """
        if self.launcher.returncode is not None:
            return
        if pids := kill_session(self.launcher.pid):
            raise UserError(f"processes {pids} do not end: they wait for a device or a disk; repair it or this host")
        self.launcher.wait()

    def _launcher_is_gone(self) -> bool:
        """Whether the launcher has ended; `kill` reaps it last, so that no other session can get its number."""
        return is_gone(self.launcher.pid, self.launcher.pid)

    def _running(self, beats: Sequence[Beat]) -> list[Beat]:
        return [beat for beat in beats if not is_gone(beat.pid, self.launcher.pid)]

    def _has_failed_rank(self, beats: Sequence[Beat], running: Sequence[Beat]) -> bool:
        """Whether a rank has ended without success; the other ranks would wait for it."""
        gone = {beat.rank for beat in beats} - {beat.rank for beat in running}
        outcomes = read_outcomes(self.folder) if gone else {}
        return any(rank not in outcomes or outcomes[rank].cause not in (DONE, STOPPED) for rank in gone)

    def _collect_outcome(self) -> Outcome:
        """Wait for the outcomes of all ranks and for the launcher's exit code, then kill what is left."""
        wait_until(lambda: not self._running(read_beats(self.folder)), OUTCOME_SECONDS)
        beats = read_beats(self.folder)
        running = self._running(beats)
        outcomes = read_outcomes(self.folder)
        for beat in running:
            send_signal(beat.pid, self.launcher.pid, signal.SIGKILL)
        wait_until(self._launcher_is_gone, EXIT_CODE_SECONDS)
        self.kill()
        silent = {beat.rank for beat in beats} - {beat.rank for beat in running} - set(outcomes)
        return attempt_outcome(outcomes, sorted(silent), self.launcher.returncode)

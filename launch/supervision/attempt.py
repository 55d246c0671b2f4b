"""One attempt at a run: the launcher with this node's ranks, watched until all of them are gone."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.supervision.hang_detection import SuperviseConfig, hang, is_pausing
from launch.supervision.outcome import DONE, HUNG, STOPPED, Outcome, read_ends, verdict
from launch.supervision.processes import LOOK_SECONDS, is_gone, kill_session, send
from mcl_dist.distributed.heartbeat import Beat, read_beats
from mcl_dist.errors import EXIT_FAILURE, UserError

WORDS_SECONDS = 2.0  # for the other ranks to say what they met when one is gone
CODE_SECONDS = 3.0  # for the launcher to find out with which exit code


@dataclass
class Attempt:
    """The launcher in a session of its own, which whatever it starts belongs to.

    Attributes:
        launcher: leader of the session.
        folder: where its ranks beat and leave word.
        num_ranks: on this node.
        limits: when a rank hangs.
    """

    launcher: subprocess.Popen[bytes]
    folder: Path
    num_ranks: int
    limits: SuperviseConfig
    _signalled: set[int] = field(default_factory=set)
    _began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, command: Sequence[str], environment: dict[str, str], folder: Path, num_ranks: int, limits: SuperviseConfig
    ) -> Attempt:
        """Start the launcher; no terminal's signal reaches it."""
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(launcher, folder, num_ranks, limits)

    @property
    def step(self) -> int:
        """Steps done."""
        return max((beat.step for beat in read_beats(self.folder)), default=0)

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Send a signal to every rank that has come to life since the last call."""
        for beat in read_beats(self.folder):
            if beat.rank not in self._signalled and send(beat.pid, self.launcher.pid, number):
                self._signalled.add(beat.rank)

    def is_pausing(self) -> bool:
        """Whether a rank is at what may take long."""
        beats = self._present(read_beats(self.folder))
        return len(beats) < self.num_ranks or is_pausing(beats)

    def ended(self, *, others_pause: bool = False) -> Outcome | None:
        """How it ended, once it has; then nothing is left of it.

        Args:
            others_pause: on another node, a rank is at what may take long.
        """
        beats = read_beats(self.folder)
        present = self._present(beats)
        if self._launcher_is_gone() or self._are_lost(beats, present):
            return self._verdict()
        now = time.monotonic()
        reason = hang(present, self.limits, now, others_pause=others_pause)
        if reason is None and len(beats) < self.num_ranks and now - self._began > self.limits.pause_seconds:
            reason = f"{self.num_ranks - len(beats)} ranks have not come to life for {now - self._began:.0f} s"
        if reason is None:
            return None
        self.kill()
        return Outcome(EXIT_FAILURE, HUNG, reason)

    def kill(self) -> None:
        """End the launcher and all ranks.

        Raises:
            UserError: naming processes that do not go.
        """
        if self.launcher.returncode is not None:
            return
        left = kill_session(self.launcher.pid)
        if left:
            raise UserError(f"processes {left} do not end, they wait for a device or a disk; mend that, or this host")
        self.launcher.wait()

    def _launcher_is_gone(self) -> bool:
        """Whether the launcher has ended; it is waited for last, since until then no other session has its number."""
        return is_gone(self.launcher.pid, self.launcher.pid)

    def _present(self, beats: Sequence[Beat]) -> list[Beat]:
        return [beat for beat in beats if not is_gone(beat.pid, self.launcher.pid)]

    def _are_lost(self, beats: Sequence[Beat], present: Sequence[Beat]) -> bool:
        """Whether a rank is gone that did not end well: the others can but wait for it."""
        gone = {beat.rank for beat in beats} - {beat.rank for beat in present}
        ends = read_ends(self.folder) if gone else {}
        return any(rank not in ends or ends[rank].cause not in (DONE, STOPPED) for rank in gone)

    def _verdict(self) -> Outcome:
        """Let the other ranks say what they met, and the launcher with which exit code the first one left."""
        self._wait(WORDS_SECONDS, lambda: not self._present(read_beats(self.folder)))
        beats = read_beats(self.folder)
        present = self._present(beats)
        ends = read_ends(self.folder)
        for beat in present:
            send(beat.pid, self.launcher.pid, signal.SIGKILL)
        self._wait(CODE_SECONDS, self._launcher_is_gone)
        self.kill()
        silent = {beat.rank for beat in beats} - {beat.rank for beat in present} - set(ends)
        return verdict(ends, sorted(silent), self.launcher.returncode)

    @staticmethod
    def _wait(seconds: float, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)

"""How a rank ended, or all ranks of an attempt, and whether another attempt could mend it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mcl_dist.errors import EXIT_FAILURE

DONE, STOPPED, USER = "done", "stopped", "user"
KILLED, CRASHED, HUNG, LOST = "killed", "error", "hang", "lost"
RETRIED = (KILLED, CRASHED, HUNG, LOST)
WORST_FIRST = (USER, STOPPED, KILLED, CRASHED, LOST, DONE)  # which of several ranks' ends says what happened
OUTCOME_LINE = "mcl-outcome"  # before the JSON that a node with --attached prints last
END_FILE = re.compile(r"rank-(\d+)\.end")


@dataclass(frozen=True)
class Outcome:
    """The end of a rank or of an attempt.

    Attributes:
        exit_code: of the process.
        cause: one of a few words: `done`, `stopped`, `user` (a UserError), `killed`, `error` (any other), `hang`,
            `lost` (another rank or node was gone).
        reason: the cause in a sentence.
    """

    exit_code: int
    cause: str
    reason: str

    @property
    def may_be_mended(self) -> bool:
        """Whether another attempt could go better: not where a person has to do something first."""
        return self.cause in RETRIED

    def write(self, folder: Path, rank: int) -> None:
        """Leave word in the supervisor's folder."""
        (folder / f"rank-{rank:05d}.end").write_text(json.dumps(asdict(self)))


def read_ends(folder: Path) -> dict[int, Outcome]:
    """What the ranks of this machine that have left said of it."""
    ends = {}
    for file in folder.glob("rank-*.end"):
        match = END_FILE.fullmatch(file.name)
        text = file.read_text()
        if match and text:
            ends[int(match[1])] = Outcome(**json.loads(text))
    return ends


def verdict(ends: Mapping[int, Outcome], silent: Iterable[int], launcher_code: int) -> Outcome:
    """What ended an attempt.

    Args:
        ends: what ranks said.
        silent: ranks that were gone without a word.
        launcher_code: the launcher's exit code, which is that of a rank that failed, if one did.
    """
    how = _how(launcher_code)
    told = {rank: Outcome(EXIT_FAILURE, KILLED, f"rank {rank} {how}") for rank in silent}
    told |= {rank: replace(end, reason=f"rank {rank}: {end.reason}") for rank, end in ends.items()}
    nothing = Outcome(EXIT_FAILURE, KILLED, f"the launcher {how}")
    return min(told.values(), key=lambda end: WORST_FIRST.index(end.cause), default=nothing)


def _how(code: int) -> str:
    number = -code if code < 0 else 256 - code  # a launcher passes a rank's -9 on as 247
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"left with exit code {code}"

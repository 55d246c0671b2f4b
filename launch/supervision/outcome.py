"""The outcome of a rank or of an attempt, and whether a retry can succeed."""

import json
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mcl_dist.errors import EXIT_FAILURE

DONE, STOPPED, USER = "done", "stopped", "user"
KILLED, CRASHED, HUNG, LOST = "killed", "error", "hang", "lost"
RETRYABLE = (KILLED, CRASHED, HUNG, LOST)
CAUSES_BY_PRIORITY = (USER, STOPPED, KILLED, CRASHED, LOST, DONE)  # the first that any rank has explains the attempt
OUTCOME_LINE = "mcl-outcome"  # prefix of the JSON that a node with --attached prints last
RANK_FILE = re.compile(r"rank-(\d+)\.end")


@dataclass(frozen=True)
class Outcome:
    """How a rank or an attempt ended.

    Its cause is `done`, `stopped`, `user` (a UserError), `killed`, `error` (any other exception), `hang`, or `lost`
    (another rank or node is gone); the reason is a sentence.
    """

    exit_code: int
    cause: str
    reason: str

    @property
    def is_retryable(self) -> bool:
        """Whether another attempt can succeed without a change by the user."""
        return self.cause in RETRYABLE

    def write(self, folder: Path, rank: int) -> None:
        """Write a rank's outcome to the supervisor's folder."""
        (folder / f"rank-{rank:05d}.end").write_text(json.dumps(asdict(self)))


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """Outcomes that the ranks of this machine have written, by rank."""
    outcomes = {}
    for file in folder.glob("rank-*.end"):
        if (match := RANK_FILE.fullmatch(file.name)) and (text := file.read_text()):
            outcomes[int(match[1])] = Outcome(**json.loads(text))
    return outcomes


def attempt_outcome(outcomes: Mapping[int, Outcome], silent: Iterable[int], launcher_code: int) -> Outcome:
    """The outcome of an attempt, from those of its ranks; `silent` ranks are gone without one.

    The launcher's exit code is that of a failed rank, if any.
    """
    exit_text = _describe_exit(launcher_code)
    found = {rank: Outcome(EXIT_FAILURE, KILLED, f"rank {rank} {exit_text}") for rank in silent}
    found |= {rank: replace(outcome, reason=f"rank {rank}: {outcome.reason}") for rank, outcome in outcomes.items()}
    default = Outcome(EXIT_FAILURE, KILLED, f"the launcher {exit_text}")
    return min(found.values(), key=lambda outcome: CAUSES_BY_PRIORITY.index(outcome.cause), default=default)


def _describe_exit(code: int) -> str:
    number = -code if code < 0 else 256 - code  # the launcher passes a rank's -9 on as 247
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"exited with code {code}"

"""How often a run is started again."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PAUSE = 60.0


@dataclass
class RestartPolicy:
    """So many restarts without progress.

    Attributes:
        limit: of restarts in a row.
        progress_steps: farther than ever before that begin a new row.
        in_a_row: those made since there was progress.
        farthest: step that any attempt came to.
    """

    limit: int
    progress_steps: int
    in_a_row: int = 0
    farthest: int = 0

    def allow(self, step: int) -> bool:
        """Whether another may follow an attempt that came to `step`; counts it."""
        if step >= self.farthest + self.progress_steps:
            self.in_a_row = 0
        self.farthest = max(self.farthest, step)
        self.in_a_row += 1
        return self.in_a_row <= self.limit

    @property
    def pause(self) -> float:
        """Seconds to wait before the one just allowed: the first is made at once, later ones wait."""
        return 0.0 if self.in_a_row < 2 else min(LONGEST_PAUSE, 2.0 ** (self.in_a_row - 2))

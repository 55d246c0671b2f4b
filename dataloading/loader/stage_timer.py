"""What each stage of the loader costs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimer:
    """CPU seconds of named stages, added up.

    They are the process's, so that decoding threads count; what else runs in the process meanwhile counts too.

    Attributes:
        seconds: by stage, so far.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add what the block takes to a stage."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.process_time() - start

"""CPU time of the loader's stages."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from mcl_dist.events import LoaderStage


class StageTimer:
    """Sums of CPU seconds by stage.

    They are CPU seconds of the process: they include decoding threads, and all else that runs at the same time.

    Attributes:
        seconds: by stage, so far.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[LoaderStage, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: LoaderStage) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.process_time() - start

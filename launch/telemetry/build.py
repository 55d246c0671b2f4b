"""What a build of a shard set shows to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dataloading.build.builder import ResumedBuild
from dataloading.build.video_processor import VideoOutcome
from dataloading.shards.format import RefusedVideo
from launch.telemetry.batch_job_metrics import showing
from mcl_dist.storage.retry import RetryPolicy
from monitoring.http.pushgateway import Pushgateway
from monitoring.metrics.registry import Registry


class BuildMetrics:
    """Counts the outcomes of a build."""

    def __init__(self, board: Registry, planned: int, patience: RetryPolicy) -> None:
        self._board = board
        board.set("mcl_build_videos_planned", planned)
        board.set("mcl_build_videos_kept", 0)
        board.set("mcl_build_complete", 0)
        board.before_scrape(
            lambda: board.update(
                "mcl_build_retries_total", {str(reason): count for reason, count in patience.failures.items()}
            )
        )

    def __call__(self, outcome: VideoOutcome | ResumedBuild) -> None:
        """Take the next video's outcome, or first of all what an earlier run left."""
        if isinstance(outcome, ResumedBuild):
            self._board.set("mcl_build_videos_kept", outcome.videos + outcome.refused)
        elif isinstance(outcome, RefusedVideo):
            self._board.add("mcl_build_refused_total", 1, outcome.reason.partition(":")[0])
        else:
            self._board.add("mcl_build_videos_total")
            self._board.add("mcl_build_frames_total", len(outcome.frames))
            self._board.add("mcl_build_bytes_total", outcome.num_bytes)

    def complete(self) -> None:
        """The manifest is written."""
        self._board.set("mcl_build_complete", 1)


@contextmanager
def build_metrics(
    port: int | None, planned: int, patience: RetryPolicy, gateway: Pushgateway | None = None
) -> Iterator[BuildMetrics]:
    """Metrics that are served on the loopback within, where there is a port, and pushed to a gateway, if one is given.

    Raises:
        UserError: the port is taken.
    """
    board = Registry(["build"])
    metrics = BuildMetrics(board, planned, patience)
    with showing(board, port, gateway, lambda: board.add("mcl_build_pushes_failed_total")):
        yield metrics

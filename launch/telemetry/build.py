"""Metrics of a shard set build."""

from collections.abc import Iterator
from contextlib import contextmanager

from dataloading.build.builder import ResumedBuild
from dataloading.build.video_processor import VideoResult
from dataloading.shards.format import RefusedVideo
from launch.telemetry.batch_job_metrics import serve_or_push
from mcl_dist.storage.retry import RetryPolicy
from monitoring.http.pushgateway import Pushgateway
from monitoring.metrics.registry import Registry


class BuildMetrics:
    """A listener that counts the results of a build of `num_planned` videos, and the failures of `retry` as retries."""

    def __init__(self, registry: Registry, num_planned: int, retry: RetryPolicy) -> None:
        self._registry = registry
        registry.set("mcl_build_videos_planned", num_planned)
        registry.set("mcl_build_videos_kept", 0)
        registry.set("mcl_build_complete", 0)

        def count_retries() -> None:
            registry.update("mcl_build_retries_total", {str(reason): n for reason, n in retry.failures.items()})

        registry.before_scrape(count_retries)

    def __call__(self, result: VideoResult | ResumedBuild) -> None:
        """Count the result of a video, or the videos that a resumed build already has."""
        if isinstance(result, ResumedBuild):
            self._registry.set("mcl_build_videos_kept", result.num_videos + result.num_refused)
        elif isinstance(result, RefusedVideo):
            self._registry.add("mcl_build_refused_total", 1, result.reason.partition(":")[0])
        else:
            self._registry.add("mcl_build_videos_total")
            self._registry.add("mcl_build_frames_total", len(result.frames))
            self._registry.add("mcl_build_bytes_total", result.num_bytes)

    def complete(self) -> None:
        """Mark the build complete: the manifest is written."""
        self._registry.set("mcl_build_complete", 1)


@contextmanager
def serve_build_metrics(
    port: int | None, num_planned: int, retry: RetryPolicy, pushgateway: Pushgateway | None = None
) -> Iterator[BuildMetrics]:
    """Serve the metrics of a build on the loopback, if there is a port, and push them to a Pushgateway, if given.

    Raises:
        UserError: the port is taken.
    """
    registry = Registry(["build"])
    metrics = BuildMetrics(registry, num_planned, retry)
    with serve_or_push(registry, port, pushgateway, lambda: registry.add("mcl_build_pushes_failed_total")):
        yield metrics

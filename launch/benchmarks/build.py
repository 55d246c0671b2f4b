"""What a worker of `mcl shards build` spends on one video, and on what."""

from __future__ import annotations

import cProfile
import resource
import time
from pathlib import Path
from typing import Any

from dataloading.build import video_processor as process
from dataloading.build.video_processor import BuildConfig, VideoProcessor
from dataloading.flow.estimators import FlowEstimator, stacked
from dataloading.motion import MotionSummary
from dataloading.shards.format import RefusedVideo
from dataloading.videos import decoder as videos
from dataloading.videos.sources import Source
from mcl_dist.config import build_config
from mcl_dist.errors import UserError


def measure_build(video: Path, flow: str) -> dict[str, Any]:
    """CPU seconds in all and by stage, and the most memory that this process held.

    Raises:
        UserError: the video is refused.
        ConfigError: no such estimator.
    """
    config = build_config(BuildConfig, {"flow": flow})
    processor = VideoProcessor(video.absolute().parent, ("class",), config)
    # The profiler's clock is the process's: stages are CPU seconds. Calls into C are not told apart, nor slowed.
    profile = cProfile.Profile(time.process_time, builtins=False)
    start = time.process_time()
    sample = profile.runcall(processor, Source(video.name, 0))
    seconds = time.process_time() - start
    if isinstance(sample, RefusedVideo):
        raise UserError(f"{video}: refused, {sample.reason}")
    return {
        "cpu_seconds": seconds,
        "stages": _stages(profile, seconds),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # told in KiB
        "frames": len(sample.frames),
        "flow": flow,
    }


def _stages(profile: cProfile.Profile, seconds: float) -> dict[str, float]:
    """Every stage's own seconds: what it calls of another stage is taken off."""
    entries = {entry.code: entry for entry in profile.getstats()}

    def spent(*functions: Any) -> float:
        return sum(entries[each.__code__].totaltime for each in functions if each.__code__ in entries)

    # Frames are encoded while they stream past on their way to the estimator.
    passing = entries[VideoProcessor._encoding.__code__]
    resize = spent(videos.resized)
    stages = {
        "decode": spent(videos.Video.__iter__) - resize,
        "resize": resize,
        "flow": spent(FlowEstimator.flows) - passing.totaltime,
        "motion": spent(MotionSummary.add, MotionSummary.frame_maps, MotionSummary.clip_scores),
        "encode": passing.inlinetime + spent(process._jpeg, stacked),
    }
    return {**stages, "other": seconds - sum(stages.values())}

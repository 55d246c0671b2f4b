"""CPU time of a `mcl shards build` worker for one video, by stage."""

import cProfile
import resource
import time
from pathlib import Path
from typing import Any

from dataloading.build.config import BuildConfig
from dataloading.build.video_processor import VideoProcessor, encode_jpeg
from dataloading.flow.estimators import FlowEstimator, stack_components
from dataloading.motion import MotionSummary
from dataloading.shards.format import RefusedVideo
from dataloading.videos.decoder import Video, resize_frame
from dataloading.videos.sources import Source
from mcl_dist.config import build_config
from mcl_dist.errors import UserError


def measure_build(video: Path, flow: str) -> dict[str, Any]:
    """CPU seconds in total and by stage, and the peak memory of this process.

    Raises:
        UserError: the video is refused.
        ConfigError: there is no such flow estimator.
    """
    config = build_config(BuildConfig, {"flow": flow})
    processor = VideoProcessor(video.absolute().parent, ("class",), config)
    # The profiler uses the process's CPU clock. Calls into C count for their caller and are not slowed down.
    profile = cProfile.Profile(time.process_time, builtins=False)
    start = time.process_time()
    sample = profile.runcall(processor, Source(video.name, 0))
    seconds = time.process_time() - start
    if isinstance(sample, RefusedVideo):
        raise UserError(f"{video}: refused, {sample.reason}")
    return {
        "cpu_seconds": seconds,
        "stages": _stages(profile, seconds),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux reports KiB
        "frames": len(sample.frames),
        "flow": flow,
    }


def _stages(profile: cProfile.Profile, seconds: float) -> dict[str, float]:
    """Each stage's own CPU seconds, without its calls of other stages."""
    entries = {entry.code: entry for entry in profile.getstats()}

    def total(*functions: Any) -> float:
        return sum(entries[each.__code__].totaltime for each in functions if each.__code__ in entries)

    # Frames are encoded while they stream to the estimator.
    encoding = entries[VideoProcessor.encode_frames.__code__]
    resize = total(resize_frame)
    stage_seconds = {
        "decode": total(Video.__iter__) - resize,
        "resize": resize,
        "flow": total(FlowEstimator.flows) - encoding.totaltime,
        "motion": total(MotionSummary.add, MotionSummary.frame_maps, MotionSummary.clip_scores),
        "encode": encoding.inlinetime + total(encode_jpeg, stack_components),
    }
    return {**stage_seconds, "other": seconds - sum(stage_seconds.values())}

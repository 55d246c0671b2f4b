"""One video file to one stored sample: decode, flow, motion, stills."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dataloading.build.local_executor import leave_if_stopped
from dataloading.build.near_duplicates import dhash
from dataloading.flow.estimators import BOUND, ESTIMATORS, SCALES, TVL1, FlowEstimator, stacked
from dataloading.motion import MotionSummary
from dataloading.shards.format import RefusedVideo, Sample
from dataloading.videos.decoder import Video, VideoRefusedError
from dataloading.videos.sources import Source
from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy
from mcl_dist.storage.store_requests import Failure

# At 95 the flow is off by 0.06 to 0.08 px (root mean square) on real clips, half a step of its bytes (0.157 px),
# and targets by 3 to 7 %, for a sixth of what the frames take; at 75 it is 0.10 to 0.13 px, and 5 to 22 %.
FLOW_QUALITY = 95

VideoOutcome = Sample | RefusedVideo


@dataclass(frozen=True)
class Processed:
    """What became of a video, and how many requests to its store had to be made again, by reason."""

    outcome: VideoOutcome
    failures: Mapping[Failure, int]


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a shard set, beside its sources.

    Attributes:
        flow: estimator, `tvl1`, `opencv-tvl1` or `dis`.
        seed: of the order of the videos.
        short_side: pixels that the shorter side is resized to; 0 keeps the size.
        window: frames that a clip covers (its length times its stride); shorter videos are refused.
        map_window: flows in the stack of a frame map.
        quality: JPEG quality of the frames.
        flow_quality: JPEG quality of the flow.
        shard_megabytes: a shard is closed once it holds as much.
        keep_every: every so many frames one is stored, with the flow to its successor in the video; its map and
            score are those that it would have if all were stored. It divides the window.
        flow_size: share of the frame's size that flow is estimated and stored at; None for the estimator's own.
        device: that `tvl1` computes on, `cpu` or `cuda`. Their flows are near each other, not the same to the bit.

    Raises:
        ConfigError: `keep_every` does not divide the window; another estimator than `tvl1` on a GPU.
    """

    flow: str = choice(*ESTIMATORS)
    seed: int = number(0, minimum=0)
    short_side: int = number(256, minimum=0)
    window: int = number(32, minimum=2)
    map_window: int = number(4, minimum=1)
    quality: int = number(90, minimum=1, maximum=100)
    flow_quality: int = number(FLOW_QUALITY, minimum=1, maximum=100)
    shard_megabytes: int = number(256, minimum=1)
    keep_every: int = number(1, minimum=1)
    flow_size: float | None = number(None, minimum=0.25, maximum=1.0)
    device: str = choice("cpu", "cuda")

    def __post_init__(self) -> None:
        if self.window % self.keep_every:
            raise ConfigError(f"keep_every: found {self.keep_every}, must divide the window, {self.window} frames")
        if self.device == "cuda" and self.flow != TVL1:
            raise ConfigError(f"device: found cuda with flow {self.flow}, only {TVL1} computes on a GPU")

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {**asdict(self), "flow_size": self.flow_size or SCALES[self.flow], "flow_bound": BOUND}


class VideoProcessor:
    """Turns one video into a sample, or says why it cannot; runs in a worker process.

    Args:
        root: folder of the videos, at any fsspec URL.
        classes: names by label.
        config: what decides the sample's bytes.
        retry_seconds, request_seconds: patience with the store of the videos (`RetryPolicy`).
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        config: BuildConfig,
        retry_seconds: float = RetryPolicy.seconds,
        request_seconds: float = RetryPolicy.request_seconds,
    ) -> None:
        # Elsewhere the same relative path would mean another folder.
        self._root = str(root) if "://" in str(root) else str(Path(root).absolute())
        self._classes = classes
        self._config = config
        self._patience = (retry_seconds, request_seconds)

    def processed(self, source: Source) -> Processed:
        """The same as calling it, and what its store took; errors as there."""
        patience = RetryPolicy(*self._patience)
        return Processed(self(source, patience), dict(patience.failures))

    def __call__(self, source: Source, patience: RetryPolicy | None = None) -> VideoOutcome:
        """The sample that `source` is stored as; the same bytes in any process.

        Raises:
            UserError: the store of the source failed; a video that is merely not there is refused.
        """
        # DIS gives other flow with other numbers of threads; and there is a worker for every core.
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            if source.refusal:
                return RefusedVideo(source.path, source.refusal)
            with local_file(self._root, source.path, patience) as file, Video(file, self._config.short_side) as video:
                return self._sample(source, video)
        except VideoRefusedError as error:
            return RefusedVideo(source.path, error.reason)
        except cv2.error as error:
            return RefusedVideo(source.path, f"unreadable: OpenCV refused its frames ({error.err}); replace it")
        finally:
            cv2.setNumThreads(threads)

    def _sample(self, source: Source, video: Video) -> Sample:
        config = self._config
        estimate = FlowEstimator(config.flow, config.flow_size, _device(config))
        motion = MotionSummary(config.map_window, config.window)
        frames: list[bytes] = []
        flow_stills: list[bytes] = []
        flow = None
        num_flows = 0
        for flow in estimate.flows(self._encoding(video, frames)):
            motion.add(flow)
            if num_flows % config.keep_every == 0:
                flow_stills.append(_jpeg(stacked(flow), config.flow_quality))
            num_flows += 1
        num_frames = num_flows + 1 if num_flows else len(frames)
        self._check_length(num_frames)
        if flow is not None:
            # The last frame has no successor: it repeats its predecessor's flow.
            flow_stills.append(flow_stills[-1])
            motion.add(flow)
        # Frames over at the end have no score of their own: a clip that held them would reach past it.
        num_stored = num_frames // config.keep_every
        frames, flow_stills = frames[:num_stored], flow_stills[:num_stored]
        info = self._info(source, video, num_stored, estimate.size(video.height, video.width))
        info["dhash"] = dhash(frames)
        maps, scores = motion.frame_maps()[:: config.keep_every], motion.clip_scores()[:: config.keep_every]
        return Sample(key_of(source), info, frames, flow_stills, maps[:num_stored], scores)

    def _encoding(self, video: Iterable[np.ndarray], stills: list[bytes]) -> Iterator[np.ndarray]:
        """The frames as they come; those to be stored are added to `stills`."""
        for place, frame in enumerate(video):
            leave_if_stopped()
            if place % self._config.keep_every == 0:
                stills.append(_jpeg(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), self._config.quality))
            yield frame

    def _check_length(self, num_frames: int) -> None:
        needed = max(self._config.window, self._config.map_window)
        if num_frames < needed:
            raise VideoRefusedError(
                "too short", f"{num_frames} frames, a window has {needed}; leave it out or give a smaller --window"
            )

    def _info(self, source: Source, video: Video, num_frames: int, flow_size: tuple[int, int]) -> dict[str, Any]:
        return {
            "label": source.label,
            "class": self._classes[source.label],
            "source": source.path,
            "fps": video.fps / self._config.keep_every,
            "height": video.height,
            "width": video.width,
            "flow_height": flow_size[0],
            "flow_width": flow_size[1],
            "frames": num_frames,
            "keep_every": self._config.keep_every,
            "flow": self._config.flow,
            "flow_bound": BOUND,
        }


@contextmanager
def local_file(root: str, path: str, patience: RetryPolicy | None = None) -> Iterator[Path]:
    """The file at `path` below the folder: itself on this machine, else a copy that goes when the block ends.

    Raises:
        VideoRefusedError: it is not there.
        UserError: the store or the disk failed.
    """
    folder = Folder(root, patience)
    gone = VideoRefusedError("missing", "it was listed but is gone; fetch it or leave it out")
    if folder.is_local:
        local = Path(folder.path(path))
        if not local.exists():
            raise gone
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="mcl-video-") as temporary:
        file = Path(temporary) / f"video{Path(path).suffix}"
        try:
            folder.get(path, file)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise gone from error
            raise
        yield file


def key_of(source: Source) -> str:
    """A name for the tar: what of the file's own name it can carry, and a digest of its path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.path).stem)[:60]
    return f"{stem}-{hashlib.sha256(os.fsencode(source.path)).hexdigest()[:12]}"


def _device(config: BuildConfig) -> str:
    """The GPUs of a machine are shared out among its worker processes."""
    return config.device if config.device == "cpu" else f"cuda:{os.getpid() % max(1, torch.cuda.device_count())}"


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

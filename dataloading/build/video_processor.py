"""Turns one video file into one stored sample: decode, flow, motion, stills."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import raise_if_cancelled
from dataloading.build.near_duplicates import dhash
from dataloading.flow.constants import BOUND
from dataloading.flow.estimators import FlowEstimator, stack_components
from dataloading.motion import MotionSummary
from dataloading.shards.format import RefusedVideo, Sample
from dataloading.videos.decoder import Video, VideoRefusedError
from dataloading.videos.sources import Source
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.retry import RetryPolicy
from mcl_dist.storage.store_requests import Failure

VideoResult = Sample | RefusedVideo


@dataclass(frozen=True)
class ProcessedVideo:
    """The result of a video, and the number of requests to its store that were repeated, by reason."""

    result: VideoResult
    failures: Mapping[Failure, int]


class VideoProcessor:
    """Turns one video into a sample or a refusal with its reason; runs in a worker process.

    Args:
        root: folder of the videos, at any fsspec URL.
        classes: class names by label.
        config: settings that decide the bytes of the sample.
        retry_seconds, request_seconds: `RetryPolicy` of requests to the store of the videos.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        config: BuildConfig,
        retry_seconds: float = RetryPolicy.seconds,
        request_seconds: float = RetryPolicy.request_seconds,
    ) -> None:
        # A worker on another machine has another working directory.
        self._root = str(root) if "://" in str(root) else str(Path(root).absolute())
        self._classes = classes
        self._config = config
        self._limits = (retry_seconds, request_seconds)

    def process(self, source: Source) -> ProcessedVideo:
        """Process the video under a new retry policy and return its failures too; raises as `__call__`."""
        retry = RetryPolicy(*self._limits)
        return ProcessedVideo(self(source, retry), dict(retry.failures))

    def __call__(self, source: Source, retry: RetryPolicy | None = None) -> VideoResult:
        """Make the sample of `source`; the same bytes in any process.

        Raises:
            UserError: the store of the source failed. A missing video is refused instead.
        """
        # DIS flow depends on the number of threads, and there is one worker for every core.
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            if source.refusal:
                return RefusedVideo(source.path, source.refusal)
            with ensure_local(self._root, source.path, retry) as file, Video(file, self._config.short_side) as video:
                return self._sample(source, video)
        except VideoRefusedError as error:
            return RefusedVideo(source.path, error.reason)
        except cv2.error as error:
            return RefusedVideo(source.path, f"unreadable: OpenCV refused its frames ({error.err}); replace it")
        finally:
            cv2.setNumThreads(threads)

    def _sample(self, source: Source, video: Video) -> Sample:
        config = self._config
        estimator = FlowEstimator(config.flow, config.flow_size, _device(config))
        motion = MotionSummary(config.map_window, config.window)
        frames: list[bytes] = []
        num_flows, flow_stills = self._encode_flow(estimator.flows(self.encode_frames(video, frames)), motion)
        num_frames = num_flows + 1 if num_flows else len(frames)
        self._check_length(num_frames)
        # Drop the frames after the last whole group of `keep_every`: a clip with one would reach past the video's end.
        num_stored = num_frames // config.keep_every
        frames = frames[:num_stored]
        info = self._info(source, video, num_stored, estimator.size(video.height, video.width))
        info["dhash"] = dhash(frames)
        maps, scores = motion.frame_maps()[:: config.keep_every], motion.clip_scores()[:: config.keep_every]
        return Sample(sample_key(source), info, frames, flow_stills[:num_stored], maps[:num_stored], scores)

    def _encode_flow(self, flows: Iterable[np.ndarray], motion: MotionSummary) -> tuple[int, list[bytes]]:
        """Add every flow to `motion`; returns the number of flows and the JPEGs of the stored ones."""
        stills: list[bytes] = []
        flow = None
        num_flows = 0
        for flow in flows:
            motion.add(flow)
            if num_flows % self._config.keep_every == 0:
                stills.append(encode_jpeg(stack_components(flow), self._config.flow_quality))
            num_flows += 1
        if flow is not None:
            # The last frame has no next one: it repeats the flow of its predecessor.
            stills.append(stills[-1])
            motion.add(flow)
        return num_flows, stills

    def encode_frames(self, video: Iterable[np.ndarray], stills: list[bytes]) -> Iterator[np.ndarray]:
        """Pass the frames through and append the JPEGs of the stored ones to `stills`."""
        for number, frame in enumerate(video):
            raise_if_cancelled()
            if number % self._config.keep_every == 0:
                stills.append(encode_jpeg(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), self._config.quality))
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
def ensure_local(root: str, path: str, retry: RetryPolicy | None = None) -> Iterator[Path]:
    """Yield the local file of `path` below `root`; a file in a store is copied, and the copy removed afterwards.

    Raises:
        VideoRefusedError: the file does not exist.
        UserError: the store or the disk failed.
    """
    folder = Folder(root, retry)
    missing = VideoRefusedError("missing", "it was listed but is gone; fetch it or leave it out")
    if folder.is_local:
        local = Path(folder.path(path))
        if not local.exists():
            raise missing
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="mcl-video-") as temporary:
        file = Path(temporary) / f"video{Path(path).suffix}"
        try:
            folder.get(path, file)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise missing from error
            raise
        yield file


def sample_key(source: Source) -> str:
    """Name of the sample in the tar: the file name's safe characters and a digest of its path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.path).stem)[:60]
    return f"{stem}-{hashlib.sha256(os.fsencode(source.path)).hexdigest()[:12]}"


def _device(config: BuildConfig) -> str:
    """The device of this process; the worker processes of a machine share its GPUs."""
    return config.device if config.device == "cpu" else f"cuda:{os.getpid() % max(1, torch.cuda.device_count())}"


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode a grey (H, W) or BGR (H, W, 3) uint8 image."""
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

"""The evenly spaced, centre-cropped clips that probes are trained and tested on (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dataloading.pipeline import StillDecoder
from dataloading.stream import ShardSet, StoredVideo

NUM_CLIPS = 20


@dataclass(frozen=True)
class ClipGeometry:
    """Shape of a clip: frames, source frames from one to the next, and side in pixels."""

    frames: int
    stride: int
    crop: int


@dataclass(frozen=True)
class ClipBatch:
    """The clips of V videos.

    Attributes:
        clips: uint8 (V, clips of a video, T, H, W, 3), RGB, on the device.
        labels: int64 (V,), the set's class of each video.
        positions: int64 (V,), of each video in the set.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ProbeClips:
    """Every video of a shard set in its order, a few at a time, as `num_clips` clips each.

    Raises:
        ConfigError: the set does not store the frames that the geometry's stride asks for.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        geometry: ClipGeometry,
        *,
        device: torch.device,
        num_clips: int = NUM_CLIPS,
        batch_videos: int = 4,
        threads: int = 2,
    ) -> None:
        self.geometry = geometry
        self._stride = shard_set.stored_stride(geometry.stride)
        self.num_clips = num_clips
        self._shard_set = shard_set
        self._device = device
        self._batch_videos = batch_videos
        self._threads = threads

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._shard_set) // self._batch_videos)

    def __iter__(self) -> Iterator[ClipBatch]:
        """Decode batch by batch; errors of storage and of damaged stills are `UserError`."""
        crop = self.geometry.crop
        decoder = StillDecoder(size=(crop, crop), grey=False, device=self._device, threads=self._threads)
        try:
            for first in range(0, len(self._shard_set), self._batch_videos):
                yield self._batch(decoder, np.arange(first, min(first + self._batch_videos, len(self._shard_set))))
        finally:
            decoder.close()

    def _batch(self, decoder: StillDecoder, positions: np.ndarray) -> ClipBatch:
        clips = torch.stack([self._clips(decoder, self._shard_set.read(int(position))) for position in positions])
        labels = torch.from_numpy(np.asarray(self._shard_set.labels)[positions])
        return ClipBatch(clips, labels, torch.from_numpy(positions))

    def _clips(self, decoder: StillDecoder, video: StoredVideo) -> torch.Tensor:
        """(num_clips, T, H, W, 3) of one video; a still that several clips share is decoded once."""
        shape = self.geometry
        wanted = clip_frames(video.num_frames, shape.frames, self._stride, self.num_clips)
        needed, places = np.unique(wanted, return_inverse=True)
        window = centre_window(video.height, video.width, shape.crop)
        stills = decoder(video.frames(needed), np.tile(window, (len(needed), 1)))
        return stills[torch.from_numpy(places.reshape(wanted.shape)).to(stills.device)]


def clip_starts(num_frames: int, clip_frames: int, stride: int, num_clips: int = NUM_CLIPS) -> tuple[np.ndarray, int]:
    """Evenly spaced starts int64 (num_clips,), 1-based, in a video repeated so many times.

    A video shorter than a clip's window L is stretched to at least L frames: each frame stands `repeats` times.

    Source: METHOD.md section 6, whose 20 clips are `num_clips` here.
    """
    window = clip_frames * stride
    repeats = -(-window // num_frames)
    total = num_frames * repeats
    clip = np.arange(num_clips)
    if total // num_clips >= window:
        return 1 + clip * (total // num_clips), repeats
    return 1 + clip * (total - window) // max(num_clips - 1, 1), repeats


def clip_frames(num_frames: int, frames: int, stride: int, num_clips: int = NUM_CLIPS) -> np.ndarray:
    """Frame indices int64 (num_clips, frames), 0-based, in the video as it is stored."""
    starts, repeats = clip_starts(num_frames, frames, stride, num_clips)
    repeated: np.ndarray = starts[:, None] - 1 + stride * np.arange(frames)
    return repeated // repeats


def centre_window(height: int, width: int, crop: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the centre of a frame: `crop` square, or as much as the short side gives."""
    side = min(height, width, crop)
    return (height - side) // 2, (width - side) // 2, side, side

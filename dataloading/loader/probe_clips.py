"""The evenly spaced, centre-cropped clips that probes are trained and tested on (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dataloading.loader.dali_decoder import StillDecoder
from dataloading.reading.shard_set import ShardSet, StoredVideo
from mcl_dist.config import number
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.model.encoder import STEM_STRIDE

NUM_CLIPS = 20


@dataclass(frozen=True)
class ClipsConfig:
    """Which clips of a video an evaluation looks at.

    Attributes:
        frames, stride, crop: of a clip, in frames, source frames and pixels; None as in the encoder's own training.
        count: evenly spaced clips of a video.
        crops: 1 takes the centre of a frame, 3 also both ends of its longer side.
    """

    frames: int | None = number(None, minimum=STEM_STRIDE[0])
    stride: int | None = number(None, minimum=1)
    crop: int | None = number(None, minimum=16)
    count: int = number(NUM_CLIPS, minimum=1)
    crops: int = number(1, minimum=1, maximum=3)

    def __post_init__(self) -> None:
        if self.crops == 2:
            raise ConfigError("clips.crops: found 2, must be 1 (the centre) or 3 (along the longer side)")


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
        clips: uint8 (V, clips x crops of a video, T, H, W, 3), RGB, on the device asked for.
        labels: int64 (V,), the set's class of each video.
        positions: int64 (V,), of each video in the set.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ProbeClips:
    """Videos of a shard set in its order, a few at a time, as `num_clips` clips of `num_crops` crops each.

    Args:
        device: of the clips.
        decoder_device: where they are decoded; None: on `device`, too.
        positions: of the videos in the set; None for all.

    Raises:
        ConfigError: the set does not store the frames that the geometry's stride asks for.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        geometry: ClipGeometry,
        *,
        device: torch.device,
        decoder_device: torch.device | None = None,
        num_clips: int = NUM_CLIPS,
        num_crops: int = 1,
        positions: range | None = None,
        batch_videos: int = 4,
        threads: int = 2,
    ) -> None:
        self.geometry = geometry
        self._stride = shard_set.stored_stride(geometry.stride, key="clips.stride")
        self.num_clips = num_clips
        self.num_crops = num_crops
        self._shard_set = shard_set
        self._positions = range(len(shard_set)) if positions is None else positions
        self._device = device
        self._decoder_device = decoder_device or device
        self._batch_videos = batch_videos
        self._threads = threads

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._positions) // self._batch_videos)

    def name_of(self, place: int) -> str:
        """Shard and key of the video that comes at a place, from 0."""
        return self._shard_set.name_of(self._positions[place])

    def __iter__(self) -> Iterator[ClipBatch]:
        """Decode batch by batch; errors of storage and of damaged stills are `UserError`."""
        crop = self.geometry.crop
        decoder = StillDecoder(size=(crop, crop), grey=False, device=self._decoder_device, threads=self._threads)
        self._shard_set.expect(self._positions)
        try:
            for first in range(0, len(self._positions), self._batch_videos):
                yield self._batch(decoder, np.array(self._positions[first : first + self._batch_videos]))
        finally:
            decoder.close()

    def _batch(self, decoder: StillDecoder, positions: np.ndarray) -> ClipBatch:
        clips = torch.stack([self._clips(decoder, self._shard_set.read(int(position))) for position in positions])
        labels = torch.from_numpy(np.asarray(self._shard_set.labels)[positions])
        return ClipBatch(clips.to(self._device), labels, torch.from_numpy(positions))

    def _clips(self, decoder: StillDecoder, video: StoredVideo) -> torch.Tensor:
        """(num_clips x num_crops, T, H, W, 3) of one video; a still that several clips share is decoded once."""
        shape = self.geometry
        wanted = clip_frames(video.num_frames, shape.frames, self._stride, self.num_clips)
        needed, places = np.unique(wanted, return_inverse=True)
        windows = crop_windows(video.height, video.width, shape.crop, self.num_crops)
        still_of = np.tile(np.arange(len(needed)), self.num_crops)
        stills = video.frames(needed)
        try:
            cut = decoder(stills, np.repeat(windows, len(needed), axis=0), still_of)
        except UserError as error:
            raise video.undecodable(str(error)) from error
        crops = cut.view(self.num_crops, len(needed), *cut.shape[1:])
        return crops[:, torch.from_numpy(places.reshape(wanted.shape)).to(cut.device)].flatten(0, 1)


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


def crop_windows(height: int, width: int, crop: int, num_crops: int = 1) -> np.ndarray:
    """Top, left, height and width of a frame's crops, int64 (num_crops, 4).

    Each is `crop` square, or as much as the short side gives. One lies in the centre; three lie at the ends and in
    the middle of the longer side, centred on the shorter one (METHOD.md, section 6).
    """
    side = min(height, width, crop)
    places = np.array([1]) if num_crops == 1 else np.arange(num_crops)  # in halves of the room that there is
    tops, lefts = ((length - side) * places // 2 for length in (height, width))
    if height < width:
        tops = np.full_like(places, (height - side) // 2)
    else:
        lefts = np.full_like(places, (width - side) // 2)
    return np.stack([tops, lefts, np.full_like(places, side), np.full_like(places, side)], axis=1)

"""Evenly spaced, centre-cropped clips that probes are trained and tested on (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dataloading.loader.config import ReadingConfig
from dataloading.loader.dali_decoder import StillDecoder
from dataloading.reading.shard_set import ShardSet, StoredVideo
from mcl_dist.config import number
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.evaluation.features import rank_range
from mcl_dist.model.encoder import STEM_STRIDE

NUM_CLIPS = 20


@dataclass(frozen=True)
class ClipsConfig:
    """Which clips of a video an evaluation uses.

    Attributes:
        frames, stride, crop: of a clip, in frames, source frames and pixels; None: as the encoder was trained.
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
    """Shape of a clip: number of frames, source frames between them, side in pixels."""

    frames: int
    stride: int
    crop: int


@dataclass(frozen=True)
class ClipBatch:
    """The clips of V videos.

    Attributes:
        clips: uint8 (V, clips x crops of a video, T, H, W, 3), RGB, on the requested device.
        labels: int64 (V,), class of each video in its set.
        positions: int64 (V,), of each video in the set.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ProbeClips:
    """Batches of videos of a shard set in its order, each video as `num_clips` clips of `num_crops` crops.

    Args:
        shard_set: source of the videos.
        geometry: shape of a clip.
        device: of the clips.
        decoder_device: device that decodes them; None: `device`.
        num_clips: clips of a video.
        num_crops: crops of a clip.
        positions: of the videos in the set; None: all.
        batch_videos: videos in a batch.
        threads: decoding threads.

    Raises:
        ConfigError: the set does not store the frames that the geometry's stride needs.
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

    @classmethod
    def for_rank(
        cls,
        shard_set: ShardSet,
        geometry: ClipGeometry,
        group: ProcessGroup,
        data: ReadingConfig,
        *,
        threads: int,
        num_clips: int = NUM_CLIPS,
        num_crops: int = 1,
        positions: range | None = None,
        batch_videos: int = 1,
    ) -> ProbeClips:
        """Clips on a rank's device, decoded where `data` configures; `positions` None: the rank's share of the set."""
        return cls(
            shard_set,
            geometry,
            device=group.device,
            decoder_device=data.decoder_device(group.device),
            num_clips=num_clips,
            num_crops=num_crops,
            positions=rank_range(len(shard_set), group) if positions is None else positions,
            batch_videos=batch_videos,
            threads=threads,
        )

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._positions) // self._batch_videos)

    def name_of(self, index: int) -> str:
        """Shard and key of the video at an index of `positions`."""
        return self._shard_set.name_of(self._positions[index])

    def __iter__(self) -> Iterator[ClipBatch]:
        """Decode batch by batch.

        Raises:
            UserError: storage fails, or a still is damaged.
        """
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
        """Clips of one video, (num_clips x num_crops, T, H, W, 3); a still that clips share is decoded once."""
        frames = clip_frames(video.num_frames, self.geometry.frames, self._stride, self.num_clips)
        unique_frames, frame_index = np.unique(frames, return_inverse=True)
        num_stills = len(unique_frames)
        windows = crop_windows(video.height, video.width, self.geometry.crop, self.num_crops)
        still_index = np.tile(np.arange(num_stills), self.num_crops)
        stills = video.frames(unique_frames)
        try:
            cut = decoder(stills, np.repeat(windows, num_stills, axis=0), still_index)
        except UserError as error:
            raise video.decode_error(str(error)) from error
        crops = cut.view(self.num_crops, num_stills, *cut.shape[1:])
        return crops[:, torch.from_numpy(frame_index.reshape(frames.shape)).to(cut.device)].flatten(0, 1)


def clip_starts(num_frames: int, clip_frames: int, stride: int, num_clips: int = NUM_CLIPS) -> tuple[np.ndarray, int]:
    """Evenly spaced starts, int64 (num_clips,), 1-based, and how often each frame of the video is repeated.

    A video shorter than a clip's window L is stretched to at least L frames: each frame is repeated `repeats` times.

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
    """Frame indices, int64 (num_clips, frames), 0-based, in the stored video."""
    starts, repeats = clip_starts(num_frames, frames, stride, num_clips)
    repeated: np.ndarray = starts[:, None] - 1 + stride * np.arange(frames)
    return repeated // repeats


def crop_windows(height: int, width: int, crop: int, num_crops: int = 1) -> np.ndarray:
    """Top, left, height and width of a frame's crops, int64 (num_crops, 4).

    A crop is a square of side `crop`, or of the shorter side if that is less. One crop lies in the centre; three lie
    at both ends and in the middle of the longer side, centred on the shorter one (METHOD.md, section 6).
    """
    side = min(height, width, crop)
    half_steps = np.array([1]) if num_crops == 1 else np.arange(num_crops)  # in halves of the free margin
    tops, lefts = ((length - side) * half_steps // 2 for length in (height, width))
    if height < width:
        tops = np.full_like(half_steps, (height - side) // 2)
    else:
        lefts = np.full_like(half_steps, (width - side) // 2)
    sides = np.full_like(half_steps, side)
    return np.stack([tops, lefts, sides, sides], axis=1)

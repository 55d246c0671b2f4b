"""From read and drawn videos to a batch: decode, cut, augment, target."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dataloading.loader.augment import augment
from dataloading.loader.config import DataConfig, LabelledConfig
from dataloading.loader.dali_decoder import StillDecoder
from dataloading.loader.stage_timer import StageTimer
from dataloading.loader.video_source import EncodedVideo
from dataloading.motion import motion_target
from dataloading.shards.bad_sample import BadSampleError
from mcl_dist.batch import NUM_VIEWS, QUERY, Batch, LabelledBatch, TubeletBatch
from mcl_dist.errors import UserError

Replacement = Callable[[EncodedVideo, BadSampleError], tuple[EncodedVideo, list[BadSampleError]]]
# Stills worked on at a time: on a CPU so few that their pixels are still in the cache when they are resized.
STILLS_ON_CPU, STILLS_ON_GPU = 64, 256


class BatchMaker:
    """Decodes and cuts batches on one device, where they stay.

    Args:
        config: of tubelets, or of labelled clips.
        grid: of the tubelets' motion targets; None where there are none.
        device: which.

    Attributes:
        stages: CPU seconds of each stage so far.
    """

    def __init__(
        self, config: DataConfig | LabelledConfig, grid: tuple[int, int, int] | None, device: torch.device
    ) -> None:
        self._config = config
        self._grid = grid
        self._device = device
        self.stages = StageTimer()
        self._pixels, self._flow = (
            StillDecoder(
                size=(config.crop, config.crop),
                grey=grey,
                device=device,
                threads=config.threads,
                max_batch=STILLS_ON_GPU if device.type == "cuda" else STILLS_ON_CPU,
                hardware_share=config.hardware_share,
            )
            for grey in (False, True)
        )
        # Not on a GPU: other threads' kernels would leave the stream of this one, and join that of training.
        several = config.threads > 1 and device.type == "cpu"
        self._threads = ThreadPoolExecutor(config.threads, "augment") if several else None

    def views_shape(self, num_videos: int) -> tuple[int, ...]:
        """(B, V, T, crop, crop, 3)"""
        num_views = 1 if self._grid is None else NUM_VIEWS
        return (num_videos, num_views, self._config.frames, self._config.crop, self._config.crop, 3)

    def batch(
        self, videos: list[EncodedVideo], stand_in: Replacement, views: torch.Tensor | None = None
    ) -> tuple[Batch, list[EncodedVideo], list[BadSampleError]]:
        """The batch of these videos, into `views` where given, uint8 of `views_shape`.

        A video with a still that the decoder refuses, though it passed all checks, is replaced by what
        `stand_in` gives for it.

        Returns:
            The batch, the videos that it holds, and the bad samples that were met on the way.
        """
        bad: list[BadSampleError] = []
        if views is None:
            views = torch.empty(self.views_shape(len(videos)), dtype=torch.uint8, device=self._device)
        while isinstance(flow := self._try(views, videos), UserError):
            videos = [self._good(video, stand_in, bad) for video in videos]
        with self.stages("augment"):
            looks = [look for video in videos for look in video.looks]
            each = map if self._threads is None else self._threads.map
            list(each(augment, views.flatten(0, 1), looks))
        labels = torch.tensor([video.label for video in videos], device=self._device)
        samples = torch.tensor([video.sample for video in videos], device=self._device)
        boxes = torch.from_numpy(np.stack([video.boxes for video in videos])).to(self._device)
        if self._grid is None:
            return LabelledBatch(views, samples, boxes, labels), videos, bad
        return TubeletBatch(views, samples, boxes, self._targets(flow, videos, self._grid), labels), videos, bad

    def close(self) -> None:
        """End the threads and the decoders."""
        if self._threads is not None:
            self._threads.shutdown()
        self._pixels.close()
        self._flow.close()

    def _try(self, views: torch.Tensor, videos: list[EncodedVideo]) -> torch.Tensor | UserError:
        try:
            return self._decode(views, videos)
        except UserError as error:
            return error

    def _decode(self, views: torch.Tensor, videos: list[EncodedVideo]) -> torch.Tensor:
        """Fill the views before their augmentation; returns the query's flow, uint8 (B, T, 2, crop, crop), if any."""
        with self.stages("decode"):
            firsts = np.cumsum([0] + [len(video.frames) for video in videos])
            still_of = [first + video.frame_of for first, video in zip(firsts, videos, strict=False)]
            self._pixels.into(
                views.flatten(0, 2),
                [still for video in videos for still in video.frames],
                np.concatenate([video.windows for video in videos]),
                np.concatenate(still_of),
            )
        if self._grid is None:
            return torch.empty(0)
        with self.stages("decode flow"):
            stills = [still for video in videos for still in video.flow]
            frames = self._config.frames
            windows = np.concatenate([np.tile(video.flow_windows, (frames, 1)) for video in videos])
            flow = self._flow(stills, windows, np.repeat(np.arange(len(stills)), 2))
        return flow.view(len(videos), frames, 2, *flow.shape[1:3])

    def _good(self, video: EncodedVideo, stand_in: Replacement, bad: list[BadSampleError]) -> EncodedVideo:
        """The video itself if it can be decoded alone, else what stands in for it."""
        views = torch.empty(self.views_shape(1), dtype=torch.uint8, device=self._device)
        while isinstance(error := self._try(views, [video]), UserError):
            found = video.undecodable(str(error))
            video, more = stand_in(video, found)
            bad += [found, *more]
        return video

    def _targets(self, flow: torch.Tensor, videos: list[EncodedVideo], grid: tuple[int, int, int]) -> torch.Tensor:
        """float32 (B, T', H', W'). Magnitudes do not tell left from right: a mirrored clip's target is mirrored."""
        with self.stages("target"):
            targets = motion_target(flow.movedim(2, -1), grid)
            for target, video in zip(targets, videos, strict=True):
                if video.looks[QUERY].mirror:
                    target.copy_(target.flip(-1))
        return targets

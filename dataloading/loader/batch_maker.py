"""From encoded videos to a batch: decode, augment, compute motion targets."""

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
# Stills decoded together: on a CPU so few that their pixels are still in the cache when they are resized.
STILLS_ON_CPU, STILLS_ON_GPU = 64, 256


class BatchMaker:
    """Makes batches on one device.

    Args:
        config: of tubelets, or of labelled clips.
        grid: of the tubelets' motion targets; None without targets.
        device: of the decoding and of the batches.

    Attributes:
        timer: CPU seconds of each stage so far.
    """

    def __init__(
        self, config: DataConfig | LabelledConfig, grid: tuple[int, int, int] | None, device: torch.device
    ) -> None:
        self._config = config
        self._grid = grid
        self._device = device
        self.timer = StageTimer()
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
        # Not on a GPU: kernels of other threads would run in the stream of training, not in this thread's.
        use_threads = config.threads > 1 and device.type == "cpu"
        self._threads = ThreadPoolExecutor(config.threads, "augment") if use_threads else None

    def views_shape(self, num_videos: int) -> tuple[int, ...]:
        """Shape of the views of B videos: (B, V, T, crop, crop, 3)."""
        num_views = 1 if self._grid is None else NUM_VIEWS
        return (num_videos, num_views, self._config.frames, self._config.crop, self._config.crop, 3)

    def batch(
        self, videos: list[EncodedVideo], replacement: Replacement, views: torch.Tensor | None = None
    ) -> tuple[Batch, list[EncodedVideo], list[BadSampleError]]:
        """Make the batch of these videos, in the memory `views`, uint8 of `views_shape`, if it is given.

        A video with a still that passed all checks but that the decoder refuses is replaced by `replacement`.

        Returns:
            The batch, the videos in it, and the bad samples that were replaced.
        """
        bad: list[BadSampleError] = []
        if views is None:
            views = torch.empty(self.views_shape(len(videos)), dtype=torch.uint8, device=self._device)
        while isinstance(flow := self._try(views, videos), UserError):
            videos = [self._decodable(video, replacement, bad) for video in videos]
        with self.timer("augment"):
            augmentations = [drawn for video in videos for drawn in video.augmentations]
            map_ = map if self._threads is None else self._threads.map
            list(map_(augment, views.flatten(0, 1), augmentations))
        labels = torch.tensor([video.label for video in videos], device=self._device)
        samples = torch.tensor([video.sample for video in videos], device=self._device)
        boxes = torch.from_numpy(np.stack([video.boxes for video in videos])).to(self._device)
        if self._grid is None:
            return LabelledBatch(views, samples, boxes, labels), videos, bad
        return TubeletBatch(views, samples, boxes, self._targets(flow, videos, self._grid), labels), videos, bad

    def close(self) -> None:
        """Stop the threads and the decoders."""
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
        """Decode into the views; returns the query's flow, uint8 (B, T, 2, crop, crop); without targets empty."""
        with self.timer("decode"):
            first_stills = np.cumsum([0] + [len(video.frames) for video in videos])
            still_index = [first + video.frame_index for first, video in zip(first_stills, videos, strict=False)]
            self._pixels.into(
                views.flatten(0, 2),
                [still for video in videos for still in video.frames],
                np.concatenate([video.windows for video in videos]),
                np.concatenate(still_index),
            )
        if self._grid is None:
            return torch.empty(0)
        with self.timer("decode flow"):
            stills = [still for video in videos for still in video.flow]
            frames = self._config.frames
            windows = np.concatenate([np.tile(video.flow_windows, (frames, 1)) for video in videos])
            flow = self._flow(stills, windows, np.repeat(np.arange(len(stills)), 2))
        return flow.view(len(videos), frames, 2, *flow.shape[1:3])

    def _decodable(self, video: EncodedVideo, replacement: Replacement, bad: list[BadSampleError]) -> EncodedVideo:
        """The video itself if it can be decoded alone, else its replacement; bad samples are added to `bad`."""
        views = torch.empty(self.views_shape(1), dtype=torch.uint8, device=self._device)
        while isinstance(error := self._try(views, [video]), UserError):
            found = video.decode_error(str(error))
            video, more = replacement(video, found)
            bad += [found, *more]
        return video

    def _targets(self, flow: torch.Tensor, videos: list[EncodedVideo], grid: tuple[int, int, int]) -> torch.Tensor:
        """Motion targets, float32 (B, T', H', W'): flow magnitudes have no sign, so a mirrored clip's are mirrored."""
        with self.timer("target"):
            targets = motion_target(flow.movedim(2, -1), grid)
            for target, video in zip(targets, videos, strict=True):
                if video.augmentations[QUERY].mirror:
                    target.copy_(target.flip(-1))
        return targets

"""From a shard set to batches of tubelets: plan, read, draw, decode, augment, target."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from dataloading.augment import (
    Augmentation,
    AugmentConfig,
    augment,
    blur_radius,
    draw_augmentation,
    mirror_flow,
)
from dataloading.fetch import FetchConfig
from dataloading.motion import motion_target
from dataloading.pipeline import StillDecoder
from dataloading.plan import Plan, lanes_of_rank, sample_generator
from dataloading.prefetch import Prefetcher
from dataloading.stages import StageClock
from dataloading.stream import ShardSet, StoredVideo
from dataloading.tubelets import Box, CutConfig, Tubelet, draw_tubelets
from mcl_dist.batch import NUM_VIEWS, QUERY, TubeletBatch
from mcl_dist.config import number
from mcl_dist.errors import ConfigError, UserError


@dataclass(frozen=True)
class DataConfig(FetchConfig):
    """What is trained on and how it is cut; how it is fetched, see `FetchConfig`.

    Attributes:
        train: URL of the shard set.
        frames, stride, crop: of a clip, in frames, source frames (whether the set stores them all or not) and
            pixels.
        min_windows: videos under so many windows (frames x stride) are left out.
        motion_probability: chance that a video's starts are motion-focused.
        shuffle_window: videos of a lane that an epoch shuffles among themselves.
        threads: decoding threads of a rank.
        prefetch: batches made ahead.
        cache: local folder for the shards of a set that is elsewhere, shared by the processes of a machine.
        augment: ranges of crops and what is done to the pixels.
    """

    train: str
    frames: int = number(16, minimum=1)
    stride: int = number(2, minimum=1)
    crop: int = number(224, minimum=16)
    min_windows: int = number(1, minimum=1)
    motion_probability: float = number(0.7, minimum=0, maximum=1)
    shuffle_window: int = number(256, minimum=1)
    workers: int = number(0, minimum=0)
    threads: int = number(1, minimum=1)
    prefetch: int = number(2, minimum=1)
    cache: str | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class DrawnVideo:
    """A video and all that chance decides of it: its order label and four views with their looks."""

    video: StoredVideo
    order: int
    tubelets: tuple[Tubelet, ...]
    looks: tuple[Augmentation, ...]


class TubeletLoader:
    """One rank's batches from `start_step` on, to the end of `epochs` epochs or without end; made ahead in a thread.

    What the global batch of a step holds depends on (seed, step, global_batch) and the set alone.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        num_left_out: videos of the set that are too short.
        num_steps: up to which batches come, counted from the first epoch's first; None without end.
        stages: CPU seconds of each stage so far.
        bytes_read: bytes of the members and stills read so far.
        bytes_decoded: bytes of the stills decoded so far.

    Raises:
        UserError: the set cannot be read, or has too few usable videos.
        ConfigError: ranks do not divide the global batch, the grid of the targets does not divide a clip, the
            blur is wider than a view, or the set does not store the frames that the stride asks for.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        grid: tuple[int, int, int],
        device: torch.device,
        start_step: int = 0,
        epochs: int | None = None,
    ) -> None:
        check_clips(config, grid)
        self._config = config
        self._set = ShardSet(config.train, config.cache, config)
        self._cut = CutConfig(
            frames=config.frames,
            stride=self._set.stored_stride(config.stride),
            motion_probability=config.motion_probability,
            area=config.augment.area,
            aspect=config.augment.aspect,
        )
        self._seed = seed
        self._grid = grid
        self._device = device
        self._lanes = lanes_of_rank(rank, num_ranks=num_ranks, lanes=global_batch)
        self._usable = np.flatnonzero(self._set.num_frames >= config.min_windows * self._cut.window)
        self.num_left_out = len(self._set) - len(self._usable)
        self._plan = Plan(len(self._usable), lanes=global_batch, seed=seed, shuffle_window=config.shuffle_window)
        self.steps_per_epoch = self._plan.steps_per_epoch
        self._pixels, self._flow = (
            StillDecoder(size=(config.crop, config.crop), grey=grey, device=device, threads=config.threads)
            for grey in (False, True)
        )
        self.stages = StageClock()
        self.bytes_read = self.bytes_decoded = 0
        self.num_steps = None if epochs is None else epochs * self.steps_per_epoch
        steps = itertools.count(start_step) if self.num_steps is None else range(start_step, self.num_steps)
        batches = (self._batch(step) for step in steps)
        self._ahead = Prefetcher(batches, depth=config.prefetch, name="tubelet-loader")

    def __iter__(self) -> Iterator[TubeletBatch]:
        return iter(self._ahead)

    def name_of(self, position: int) -> str:
        """What messages call the video at a position of `TubeletBatch.samples`."""
        return self._set.name_of(position)

    def close(self) -> None:
        """End the thread and the decoders; the batches are over."""
        self._ahead.close()
        self._pixels.close()
        self._flow.close()
        self._set.close()

    def _batch(self, step: int) -> TubeletBatch:
        epoch = step // self.steps_per_epoch
        positions = self._usable[self._plan.samples(step, self._lanes)]
        with self.stages("draw"):
            drawn = [self._draw(epoch, int(position)) for position in positions]
        return TubeletBatch(
            views=self._views(drawn),
            motion=self._targets(drawn),
            order=torch.tensor([one.order for one in drawn], device=self._device),
            samples=torch.from_numpy(positions).to(self._device),
        )

    def _draw(self, epoch: int, position: int) -> DrawnVideo:
        """Read what the draws look at, and draw; no pixel is touched yet."""
        video = self._set.read(position)
        self._check_window(video)
        self.bytes_read += video.frame_maps.nbytes + video.clip_scores.nbytes
        rng = sample_generator(self._seed, epoch, position)
        order, tubelets = draw_tubelets(
            rng,
            self._cut,
            frame_maps=video.frame_maps,
            clip_scores=video.clip_scores,
            height=video.height,
            width=video.width,
        )
        looks = tuple(draw_augmentation(rng, self._config.augment) for _ in tubelets)
        return DrawnVideo(video, order, tubelets, looks)

    def _views(self, drawn: list[DrawnVideo]) -> torch.Tensor:
        """uint8 (B, 4, T, crop, crop, 3)"""
        stills, windows = [], []
        with self.stages("read"):
            for one in drawn:
                for tubelet in one.tubelets:
                    stills += self._counted(one.video.frames(tubelet.frames))
                    windows += [tubelet.box] * len(tubelet.frames)
        with self.stages("decode"):
            pixels = self._decode(self._pixels, stills, windows, drawn)
        views = pixels.view(len(drawn), NUM_VIEWS, self._config.frames, *pixels.shape[1:])
        with self.stages("augment"):
            for clips, one in zip(views, drawn, strict=True):
                for clip, look in zip(clips, one.looks, strict=True):
                    clip.copy_(augment(clip, look))
        return views

    def _targets(self, drawn: list[DrawnVideo]) -> torch.Tensor:
        """float32 (B, T', H', W'), from the query's flow, cut and mirrored like its pixels."""
        stills, windows = [], []
        with self.stages("read"):
            for one in drawn:
                query = one.tubelets[QUERY]
                both = flow_windows(query.box, one.video)
                for still in self._counted(one.video.flow(query.frames)):
                    stills += [still, still]
                    windows += both
        with self.stages("decode flow"):
            components = self._decode(self._flow, stills, windows, drawn)
        with self.stages("target"):
            flow = components.view(len(drawn), -1, 2, *components.shape[1:3]).movedim(2, -1)
            mirrored = [
                mirror_flow(clip) if one.looks[QUERY].mirror else clip for clip, one in zip(flow, drawn, strict=True)
            ]
            return motion_target(torch.stack(mirrored), self._grid)

    def _decode(
        self,
        decoder: StillDecoder,
        stills: list[np.ndarray],
        windows: list[Box] | list[tuple[float, ...]],
        drawn: list[DrawnVideo],
    ) -> torch.Tensor:
        self.bytes_decoded += sum(map(len, stills))
        try:
            return decoder(stills, np.array(windows, dtype=np.float64))
        except UserError as error:
            where = "; ".join(one.video.where for one in drawn)
            raise UserError(f"{error}; in one of: {where}; run `mcl shards verify` on the set") from error

    def _counted(self, stills: list[np.ndarray]) -> list[np.ndarray]:
        self.bytes_read += sum(map(len, stills))
        return stills

    def _check_window(self, video: StoredVideo) -> None:
        stored = video.num_frames - len(video.clip_scores) + 1
        if stored != self._cut.window:
            keep_every = self._set.keep_every
            window = self._cut.window * keep_every
            raise UserError(
                f"{video.where}: its clip scores are of windows of {stored * keep_every} frames, data.frames x "
                f"data.stride is {window}; build the set with `mcl shards build … --window {window}`"
            )


def flow_windows(box: Box, video: StoredVideo) -> list[tuple[float, ...]]:
    """Where a frame's part lies in its flow still: (top, left, height, width) of the horizontal component
    and of the vertical one below it, in fractions of flow pixels.
    """
    down, across = video.flow_height / video.height, video.flow_width / video.width
    top, left, height, width = box.top * down, box.left * across, box.height * down, box.width * across
    return [(top, left, height, width), (video.flow_height + top, left, height, width)]


def check_clips(config: DataConfig, grid: tuple[int, int, int]) -> None:
    """Whether clips of this shape can be cut, and have targets on the (T', H', W') grid of the encoder.

    Raises:
        ConfigError: the grid of the targets does not divide a clip, or the blur is wider than a view.
    """
    time, rows, columns = grid
    if config.frames % time:
        raise ConfigError(f"data.frames: found {config.frames}, must be a multiple of {time}, the encoder's")
    if config.crop % rows or config.crop % columns:
        raise ConfigError(f"data.crop: found {config.crop}, must be a multiple of {rows}, the encoder's")
    sigma = config.augment.blur_sigma[1]
    if blur_radius(sigma) >= config.crop:
        raise ConfigError(f"data.augment.blur_sigma: found {sigma}, too wide for data.crop of {config.crop}")

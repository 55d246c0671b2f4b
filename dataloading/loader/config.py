"""Configuration of the loader: the sets, how clips are cut, and the processes and threads that make batches."""

from dataclasses import dataclass, field

import torch

from dataloading.loader.augment import AugmentConfig, blur_radius
from dataloading.reading.fetcher import FetchConfig
from dataloading.sampling.tubelets import CutConfig
from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError
from mcl_dist.storage.store_requests import without_credentials


@dataclass(frozen=True)
class SetConfig:
    """One of several sets: its URL, and its share of the samples, relative to the other sets' weights."""

    url: str
    weight: float = number(1.0, minimum=1e-6)


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(FetchConfig):
    """How sets are decoded; for how they are fetched see `FetchConfig`.

    Attributes:
        decode_on: device that decodes for a GPU: the `gpu` itself, which keeps most cores free, or the `cpu`, which
            leaves the GPU to the encoder and whose pixels are copied.
        cache: local folder for the shards of a remote set, shared by the processes of a machine.
    """

    decode_on: str = choice("gpu", "cpu")
    cache: str | None = None

    def decoder_device(self, device: torch.device) -> torch.device:
        """The device that decodes batches for `device`."""
        return torch.device("cpu") if self.decode_on == "cpu" else device


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(ReadingConfig):
    """Order of the samples, and processes and threads that make batches. A CPU that decodes also augments.

    Attributes:
        lanes: number of runs of samples that are read side by side; each rank reads its own. They divide the global
            batch, the ranks divide them. None: one lane for each video of the global batch.
        shuffle_window: number of consecutive videos of a lane that are shuffled among themselves in an epoch.
        max_bad_fraction: share of a rank's samples that may be bad, and replaced, before the run stops.
        workers: processes of a rank that make batches (if a GPU decodes: that read and draw for it); 0: a thread of the
            rank itself.
        threads: decoding threads of a rank or of each worker.
        prefetch: batches made ahead, in addition to the current one of each worker.
        hardware_share: share of a GPU's decoding for its hardware decoder, if it has one.
    """

    lanes: int | None = number(None, minimum=1)
    shuffle_window: int = number(256, minimum=1)
    max_bad_fraction: float = number(0.01, minimum=0, maximum=1)
    workers: int = number(0, minimum=0)
    threads: int = number(1, minimum=1)
    prefetch: int = number(2, minimum=1)
    hardware_share: float = number(0.65, minimum=0, maximum=1)


@dataclass(frozen=True)
class DataConfig(LoaderConfig):
    """The data of pre-training: the sets and how their clips are cut.

    Attributes:
        train: URL of the shard set.
        sets: several sets with their weights, instead of `train`.
        frames, stride, crop: of a clip, in frames, source frames (even if the set does not store all) and pixels.
        min_windows: videos with fewer windows (frames x stride) are left out.
        motion_probability: of motion-focused starts of a video's clips.
        motion_crops: crops cover the motion region; otherwise they lie anywhere.
        augment: ranges of crops and the augmentation of pixels.
    """

    train: str | None = None
    sets: tuple[SetConfig, ...] = ()
    frames: int = number(16, minimum=1)
    stride: int = number(2, minimum=1)
    crop: int = number(224, minimum=16)
    min_windows: int = number(1, minimum=1)
    motion_probability: float = number(0.7, minimum=0, maximum=1)
    motion_crops: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.train is None and not self.sets:
            raise ConfigError("data.train: missing; set it in the file or as data.train=URL (or data.sets for several)")
        if self.train is not None and self.sets:
            found = without_credentials(self.train)
            raise ConfigError(f"data.train: found {found} beside data.sets; give one of the two")

    def cut(self, stored_stride: int) -> CutConfig:
        """How clips and crops are drawn from a set if a clip takes every `stored_stride`-th of its stored frames."""
        return CutConfig(
            frames=self.frames,
            stride=stored_stride,
            motion_probability=self.motion_probability,
            area=self.augment.area,
            aspect=self.augment.aspect,
            motion_crops=self.motion_crops,
        )

    @property
    def all_sets(self) -> tuple[SetConfig, ...]:
        """The sets to train on, from `train` or `sets`."""
        return self.sets or (SetConfig(str(self.train)),)


@dataclass(frozen=True)
class PlainAugmentConfig(AugmentConfig):
    """Random crop and mirror only, as the reference trains its linear layer; the rest is off by default."""

    jitter_probability: float = number(0.0, minimum=0, maximum=1)
    grey_probability: float = number(0.0, minimum=0, maximum=1)
    blur_probability: float = number(0.0, minimum=0, maximum=1)


@dataclass(frozen=True)
class SupervisedConfig(LoaderConfig):
    """The loader of a classifier; `augment` is for its training clips."""

    augment: PlainAugmentConfig = field(default_factory=PlainAugmentConfig)


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(SupervisedConfig):
    """The data of a classifier: one random clip of each video (METHOD.md, section 6).

    Attributes:
        train: URL of the shard set.
        frames, stride, crop: of a clip, as in `DataConfig`.
    """

    train: str
    frames: int
    stride: int
    crop: int

    def cut(self, stored_stride: int) -> CutConfig:
        """As `DataConfig.cut`, but without regard to motion."""
        return CutConfig(
            frames=self.frames,
            stride=stored_stride,
            motion_probability=0.0,
            area=self.augment.area,
            aspect=self.augment.aspect,
            motion_crops=False,
        )

    @property
    def all_sets(self) -> tuple[SetConfig, ...]:
        """The only set, `train`."""
        return (SetConfig(self.train),)


def check_clips(config: DataConfig, grid: tuple[int, int, int]) -> None:
    """Check that clips have targets on the (T', H', W') grid of the encoder, and that the blur fits into a view.

    Raises:
        ConfigError: the grid of the targets does not divide a clip, or the blur is wider than a view.
    """
    time, rows, columns = grid
    if config.frames % time:
        raise ConfigError(f"data.frames: found {config.frames}, must be a multiple of the encoder's {time}")
    if config.crop % rows or config.crop % columns:
        raise ConfigError(f"data.crop: found {config.crop}, must be a multiple of the encoder's {rows}")
    check_blur(config)


def check_blur(config: DataConfig | LabelledConfig) -> None:
    """Check that the blur fits into a view.

    Raises:
        ConfigError: the blur is wider than a view.
    """
    sigma = config.augment.blur_sigma[1]
    if blur_radius(sigma) >= config.crop:
        raise ConfigError(f"data.augment.blur_sigma: found {sigma}, too wide for data.crop of {config.crop}")

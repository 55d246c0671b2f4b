"""Settings that decide the bytes of a shard set. `mcl shards build` derives its flags from them."""

from dataclasses import asdict, dataclass
from typing import Any

from dataloading.flow.constants import BOUND, ESTIMATORS, SCALES, TVL1
from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError


@dataclass(frozen=True)
class BuildConfig:
    """Everything but the videos that decides the bytes of a shard set.

    Attributes:
        flow: flow estimator; `dis` is faster and coarser; `mcl bench flow` compares them.
        seed: seed of the order of the videos.
        short_side: length in pixels that the shorter side is resized to; 0 keeps the size of each video.
        window: frames that a clip covers (its length times its stride); shorter videos are refused.
        map_window: flows in the stack of a frame map; 8 for UCF101.
        quality: JPEG quality of the frames.
        flow_quality: JPEG quality of the flow.
        shard_megabytes: size at which a shard is closed.
        keep_every: store one frame out of this many, with the flow to the next frame of the video; its frame map
            and clip score are computed from all frames. Must divide the window.
        flow_size: flow size as a share of the frame size; default: 1, for opencv-tvl1 0.5.
        device: device that computes `tvl1`; on cuda its flow differs in the last bits, and the manifest names the
            device; a task on a Ray cluster takes a quarter of a GPU.

    Raises:
        ConfigError: `keep_every` does not divide the window, or a GPU is to compute another estimator than `tvl1`.
    """

    flow: str = choice(*ESTIMATORS)
    seed: int = number(0, minimum=0)
    short_side: int = number(256, minimum=0)
    window: int = number(32, minimum=2)
    map_window: int = number(4, minimum=1)
    quality: int = number(90, minimum=1, maximum=100)
    # At 95 the error of the flow is 0.06 to 0.08 px (root mean square) on real clips, half a step of its bytes
    # (0.157 px), and that of the targets 3 to 7 %, for a sixth of the bytes of the frames; at 75 it is 0.10 to 0.13 px,
    # and 5 to 22 %.
    flow_quality: int = number(95, minimum=1, maximum=100)
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
        """The resolved settings as the manifest records them."""
        return {**asdict(self), "flow_size": self.flow_size or SCALES[self.flow], "flow_bound": BOUND}

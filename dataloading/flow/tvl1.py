"""TV-L1 optical flow: energy, scheme and stopping rule of OpenCV's DualTVL1, at a fraction of its cost.

Zach, Pock and Bischof 2007; Sánchez, Meinhardt-Llopis and Facciolo 2013: a pyramid, warps at every scale, and after
each warp steps of the data term and of the dual of the total variation in turn, with a median filter of the flow in
between. Steps end when the flow comes to rest, pair by pair; what OpenCV returns for frames that hardly move is the
state in which it stopped, so stopping as it does is most of agreeing with it. Ours cuts the steps after a warp short.

On a CPU a pair is solved on one core by compiled kernels (`dataloading.flow.tvl1_kernels`); on a GPU a batch of pairs
together (`dataloading.flow.tvl1_gpu`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import torch

from dataloading.flow.padded_images import aligned, inside, plane_size
from dataloading.flow.tvl1_kernels import DUAL, EARLIER, NUM_PLANES, scratch_size, solve
from dataloading.flow.tvl1_warp import fill_pictures, picture_size

SMALLEST_SIDE = 16  # of a scale of the pyramid, as in OpenCV


@dataclass(frozen=True)
class TVL1Config:
    """The energy and how far it is minimised: OpenCV's defaults but for the steps after a warp, of which it allows 300.

    How those were chosen, and what they cost in agreement, is in docs/benchmarks.md.

    Attributes:
        attachment: λ, weight of the data term; grey levels go from 0 to 255.
        tightness: θ, how far the two halves of the split energy may part.
        time_step: τ of the dual's descent.
        scales: of the pyramid, the frame's own size included.
        scale_step: size of a scale over the next larger one's.
        warps: at every scale.
        first_steps: the most that follow the first warp of a scale.
        steps: the most that follow any other.
        rest: root of the mean square of a step's change of the flow, in pixels, that ends a warp's steps.
    """

    attachment: float = 0.15
    tightness: float = 0.3
    time_step: float = 0.25
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    first_steps: int = 20
    steps: int = 8
    rest: float = 0.01

    @cached_property
    def most_steps(self) -> list[int]:
        """Warp by warp."""
        return [self.first_steps] + [self.steps] * (self.warps - 1)


def tvl1_flow(earlier: torch.Tensor, later: torch.Tensor, config: TVL1Config | None = None) -> torch.Tensor:
    """Flow of every pair from its earlier to its later frame.

    On the CPU it runs on one thread, and a pair's flow is the same to the bit in any batch.

    Args:
        earlier: grey frames (B, H, W), uint8 or float32 from 0 to 255, both sides at least 3.
        later: the same shape.
        config: how it is done; the defaults are those of the shard build.

    Returns:
        float32 (B, 2, H, W), pixels across, then down, on the frames' device.
    """
    config = config or TVL1Config()
    if earlier.device.type == "cpu":
        pairs = zip(earlier.numpy(), later.numpy(), strict=True)
        return torch.from_numpy(np.stack(list(pair_flows(pairs, config))))
    from dataloading.flow.tvl1_gpu import batch_flow

    return batch_flow(earlier, later, config)


def pair_flows(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]], config: TVL1Config | None = None
) -> Iterator[np.ndarray]:
    """The flow of every pair of grey frames (H, W) of one size, float32 (2, H, W)."""
    config = config or TVL1Config()
    scales: list[_Scale] = []
    last: tuple[np.ndarray, list[np.ndarray]] | None = None
    for first, second in pairs:
        firsts = last[1] if last and last[0] is first else _pyramid(first, config)  # frames in a row
        seconds = _pyramid(second, config)
        last = second, seconds
        if not scales:
            scales = [_Scale(frame.shape[0], frame.shape[1], config) for frame in firsts]
        flow = None
        for earlier, later, scale in reversed(list(zip(firsts, seconds, scales, strict=True))):
            flow = scale.flow(earlier, later, flow)
        yield np.array(flow)


def _pyramid(frame: np.ndarray, config: TVL1Config) -> list[np.ndarray]:
    pyramid: list[np.ndarray] = [frame.astype(np.float32)]
    while len(pyramid) < config.scales:
        smaller = cv2.resize(pyramid[-1], None, fx=config.scale_step, fy=config.scale_step)
        if min(smaller.shape) < SMALLEST_SIDE:
            break
        pyramid.append(smaller)
    return pyramid


class _Scale:
    """The memory of one scale, used pair after pair."""

    def __init__(self, height: int, width: int, config: TVL1Config) -> None:
        self._config = config
        self._size = height, width
        self._planes = aligned(NUM_PLANES, plane_size(height, width))
        self._pictures = aligned(3, picture_size(height, width))
        self._scratch = aligned(1, scratch_size(width))[0]
        self._inside = inside(self._planes, height, width)
        self._most_steps = np.array(config.most_steps, dtype=np.int64)

    def flow(self, earlier: np.ndarray, later: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        """The flow (2, H, W), of which the next call makes another; it starts from that of the next smaller scale."""
        config = self._config
        height, width = self._size
        self._planes[DUAL] = 0
        if start is None:
            self._planes[:2] = 0
        else:
            for component, plane in zip(start, self._inside[:2], strict=True):
                larger = cv2.resize(component, (width, height))
                np.multiply(larger, np.float32(1 / config.scale_step), out=plane)
        self._inside[EARLIER] = earlier
        fill_pictures(later, self._pictures, height, width)
        first = solve(
            self._planes,
            self._pictures,
            self._scratch,
            height,
            width,
            self._most_steps,
            config.tightness,
            config.attachment,
            config.time_step,
            config.rest**2,
        )
        return self._inside[first : first + 2]

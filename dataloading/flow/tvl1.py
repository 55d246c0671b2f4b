"""TV-L1 optical flow: energy, scheme and stopping rule of OpenCV's DualTVL1, at a fraction of its cost.

Zach, Pock and Bischof 2007; Sánchez, Meinhardt-Llopis and Facciolo 2013: a pyramid, warps at every scale, and after
each warp alternating steps of the data term and of the dual of the total variation, with a median filter of the flow
in between. Each pair stops when its flow has converged. For frames that hardly move OpenCV returns the state in which
it stopped, so agreement depends mostly on the same stopping rule. Ours takes fewer steps after a warp.

On a CPU compiled kernels solve a pair on one core (`dataloading.flow.tvl1_kernels`); on a GPU a batch of pairs is
solved together (`dataloading.flow.tvl1_gpu`).
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch

from dataloading.flow.padded_images import aligned_zeros, interior, padded_size
from dataloading.flow.tvl1_config import SMALLEST_SIDE, TVL1Config
from dataloading.flow.tvl1_gpu import batch_flow
from dataloading.flow.tvl1_kernels import DUAL, EARLIER, NUM_IMAGES, scratch_size, solve
from dataloading.flow.tvl1_warp import fill_sources, source_size


def tvl1_flow(earlier: torch.Tensor, later: torch.Tensor, config: TVL1Config | None = None) -> torch.Tensor:
    """Flow of every pair from its earlier to its later frame.

    On the CPU it runs on one thread, and a pair's flow is the same to the bit in any batch.

    Args:
        earlier: grey frames (B, H, W), uint8 or float32 from 0 to 255, both sides at least 3.
        later: the same shape.
        config: of the solver; defaults to that of the shard build.

    Returns:
        float32 (B, 2, H, W), pixels across, then down, on the frames' device.
    """
    config = config or TVL1Config()
    if earlier.device.type != "cpu":
        return batch_flow(earlier, later, config)
    pairs = zip(earlier.numpy(), later.numpy(), strict=True)
    return torch.from_numpy(np.stack(list(pair_flows(pairs, config))))


def pair_flows(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]], config: TVL1Config | None = None
) -> Iterator[np.ndarray]:
    """The flow of every pair of grey frames (H, W) of one size, float32 (2, H, W)."""
    config = config or TVL1Config()
    scales: list[_Scale] = []
    previous: tuple[np.ndarray, list[np.ndarray]] | None = None
    for first, second in pairs:
        # Consecutive pairs share a frame, and so its pyramid.
        firsts = previous[1] if previous and previous[0] is first else _pyramid(first, config)
        seconds = _pyramid(second, config)
        previous = second, seconds
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
    """The buffers of one scale, reused for every pair."""

    def __init__(self, height: int, width: int, config: TVL1Config) -> None:
        self._config = config
        self._size = height, width
        self._images = aligned_zeros(NUM_IMAGES, padded_size(height, width))
        self._sources = aligned_zeros(3, source_size(height, width))
        self._scratch = aligned_zeros(1, scratch_size(width))[0]
        self._interior = interior(self._images, height, width)
        self._max_steps = np.array(config.max_steps, dtype=np.int64)

    def flow(self, earlier: np.ndarray, later: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        """The flow (2, H, W), starting from that of the next smaller scale; the next call overwrites it."""
        config = self._config
        height, width = self._size
        self._images[DUAL] = 0
        if start is None:
            self._images[:2] = 0
        else:
            for component, image in zip(start, self._interior[:2], strict=True):
                larger = cv2.resize(component, (width, height))
                np.multiply(larger, np.float32(1 / config.scale_step), out=image)
        self._interior[EARLIER] = earlier
        fill_sources(later, self._sources, height, width)
        first = solve(
            self._images,
            self._sources,
            self._scratch,
            height,
            width,
            self._max_steps,
            config.tightness,
            config.attachment,
            config.time_step,
            config.tolerance**2,
        )
        return self._interior[first : first + 2]

"""Optical flow between consecutive frames, and its bytes (METHOD.md, section 1.2)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import cv2
import numpy as np
import torch

from dataloading.flow.constants import BOUND, DIS, SCALES, TVL1
from dataloading.flow.tvl1 import pair_flows, tvl1_flow

JPEG_BLOCK = 8  # rows
PAIRS_AT_ONCE = 32  # pairs estimated together: bounds the memory for a video of any length

Estimate = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]  # N grey frames to N - 1 flows, float32 (h, w, 2)


class FlowEstimator:
    """Flow between consecutive frames, in pixels of the frames given to it.

    `tvl1` is ours; `opencv-tvl1` is OpenCV's at half size with 2 warps and 1 outer iteration; `dis` finds the moving
    region less reliably. docs/reference/benchmarks.md has the cost of each and its agreement with full TV-L1.

    Args:
        name: `tvl1`, `opencv-tvl1` or `dis`.
        scale: size of the flow relative to the frames; defaults to the estimator's own, which is full size except for
            `opencv-tvl1`.
        device: PyTorch device that computes `tvl1`; a GPU's flow is close to the CPU's, but not the same to the bit.
    """

    def __init__(self, name: str, scale: float | None = None, device: str = "cpu") -> None:
        self._scale = SCALES[name] if scale is None else scale
        self._estimate = _estimate(name, device)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the flow for a frame size; no JPEG block of a flow still holds both components."""
        return JPEG_BLOCK * round(height * self._scale / JPEG_BLOCK), round(width * self._scale)

    def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Stream the flow from every frame to the next, N - 1 for N frames.

        A pair's flow depends only on its own two frames.

        Args:
            frames: RGB, uint8 (H, W, 3), all of one size.

        Yields:
            flow as bytes, uint8 (h, w, 2), across then down.
        """
        waiting: list[np.ndarray] = []
        factor = np.ones(2, dtype=np.float32)
        for frame in frames:
            height, width = frame.shape[:2]
            flow_height, flow_width = self.size(height, width)
            factor = np.array([width / flow_width, height / flow_height], dtype=np.float32)
            waiting.append(_grey(frame, flow_height, flow_width))
            if len(waiting) > PAIRS_AT_ONCE:
                yield from self._encode(waiting, factor)
                del waiting[:-1]
        if len(waiting) > 1:
            yield from self._encode(waiting, factor)

    def _encode(self, grey: Sequence[np.ndarray], factor: np.ndarray) -> Iterator[np.ndarray]:
        is_full_size = (factor == 1).all()
        return (flow_bytes(flow if is_full_size else flow * factor) for flow in self._estimate(grey))


def flow_bytes(flow: np.ndarray) -> np.ndarray:
    """Pixels to bytes: clipped to ±20, then round((f + 20)·255/40)."""
    coded = flow.clip(-BOUND, BOUND)
    coded += BOUND
    coded *= 255 / (2 * BOUND)
    return np.asarray(np.rint(coded, out=coded), dtype=np.uint8, order="C")


def flow_pixels(coded: np.ndarray) -> np.ndarray:
    """Bytes to pixels, float32 of the same shape; the inverse of `flow_bytes`, up to half a step (0.08 px)."""
    return coded.astype(np.float32) * np.float32(2 * BOUND / 255) - np.float32(BOUND)


def stack_components(flow_hw2: np.ndarray) -> np.ndarray:
    """The grey image (2H, W) in which a flow is stored: across above down, so that neither bleeds into the other."""
    return np.concatenate([flow_hw2[..., 0], flow_hw2[..., 1]])


def _grey(frame_hw3: np.ndarray, height: int, width: int) -> np.ndarray:
    grey = cv2.cvtColor(frame_hw3, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA))


def _estimate(name: str, device: str) -> Estimate:
    if name == TVL1:
        return _cpu_tvl1 if device == "cpu" else partial(_gpu_tvl1, device)
    algorithm = _dis() if name == DIS else dual_tvl1(warps=2, outer_iterations=1)
    return lambda frames: opencv_flows(algorithm, frames)


def _cpu_tvl1(frames: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    return (flow.transpose(1, 2, 0) for flow in pair_flows(pairwise(frames)))


def _gpu_tvl1(device: str, frames: Sequence[np.ndarray]) -> np.ndarray:
    stack = torch.from_numpy(np.stack(frames)).to(device)
    return tvl1_flow(stack[:-1], stack[1:]).permute(0, 2, 3, 1).cpu().numpy()


def opencv_flows(algorithm: cv2.DenseOpticalFlow, frames: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Flow from every grey frame to the next by an OpenCV estimator, float32 (H, W, 2) each."""
    for earlier, later in pairwise(frames):
        # An estimator starts at the flow that it is given: zeros, not the previous pair's.
        yield np.asarray(algorithm.calc(earlier, later, np.zeros((*earlier.shape, 2), np.float32)))


def dual_tvl1(warps: int | None = None, outer_iterations: int | None = None) -> cv2.DenseOpticalFlow:
    """OpenCV's TV-L1, by default with OpenCV's settings."""
    algorithm = cv2.optflow.createOptFlow_DualTVL1()
    if warps is not None:
        algorithm.setWarpingsNumber(warps)
    if outer_iterations is not None:
        algorithm.setOuterIterations(outer_iterations)
    return algorithm


def _dis() -> cv2.DenseOpticalFlow:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

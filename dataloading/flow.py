"""Optical flow between consecutive frames, and its bytes (METHOD.md, section 1.2)."""

from __future__ import annotations

import cv2
import numpy as np

TVL1 = "tvl1"
DIS = "dis"
BOUND = 20.0  # pixels of the stored frame that a component is clipped to, either way
HALF = 0.5


class FlowEstimator:
    """Flow by OpenCV, in pixels of the frames given to it.

    `tvl1` works at half size with 2 warps and 1 outer iteration: its motion agrees with full TV-L1 as well
    as the costlier settings do, at half to a third of their time. `dis` works at full size, some fifteen
    times faster, and points at the moving region less reliably.
    """

    def __init__(self, name: str) -> None:
        self._scale = HALF if name == TVL1 else 1.0
        self._algorithm = _dual_tvl1() if name == TVL1 else _dis()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the flow of frames of that size."""
        return round(height * self._scale), round(width * self._scale)

    def __call__(self, earlier_hw3: np.ndarray, later_hw3: np.ndarray) -> np.ndarray:
        """Flow from one RGB frame, uint8 (H, W, 3), to the next: bytes, uint8 (h, w, 2), across then down."""
        height, width = earlier_hw3.shape[:2]
        flow_height, flow_width = self.size(height, width)
        earlier, later = (_grey(frame, flow_height, flow_width) for frame in (earlier_hw3, later_hw3))
        # Zeros in and out: an estimator's start is the flow it is handed, never a neighbour's.
        flow = np.asarray(self._algorithm.calc(earlier, later, np.zeros((flow_height, flow_width, 2), np.float32)))
        return flow_bytes(flow * np.array([width / flow_width, height / flow_height], dtype=np.float32))


def flow_bytes(flow: np.ndarray) -> np.ndarray:
    """Pixels to bytes: clipped to 20 either way, round((f + 20)·255/40)."""
    coded = (flow.clip(-BOUND, BOUND) + BOUND) * (255 / (2 * BOUND))
    return np.asarray(np.rint(coded), dtype=np.uint8)


def flow_pixels(coded: np.ndarray) -> np.ndarray:
    """Bytes to pixels, float32 of the same shape: what `flow_bytes` took, to half a step (0.08 px)."""
    return coded.astype(np.float32) * np.float32(2 * BOUND / 255) - np.float32(BOUND)


def stacked(flow_hw2: np.ndarray) -> np.ndarray:
    """The grey picture (2H, W) that flow is stored as: across above down, so that neither bleeds into the other."""
    return np.concatenate([flow_hw2[..., 0], flow_hw2[..., 1]])


def _grey(frame_hw3: np.ndarray, height: int, width: int) -> np.ndarray:
    grey = cv2.cvtColor(frame_hw3, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA))


def _dual_tvl1() -> cv2.DenseOpticalFlow:
    algorithm = cv2.optflow.createOptFlow_DualTVL1()
    algorithm.setWarpingsNumber(2)
    algorithm.setOuterIterations(1)
    return algorithm


def _dis() -> cv2.DenseOpticalFlow:
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

"""Where a video moves: frame maps, clip scores and training targets from flow bytes (METHOD.md, section 1).

A motion boundary is the gradient of the flow: what a steady camera adds to the flow is flat and vanishes in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everybody knows it by

MAP_CELLS = 7
MAP_SIZE = 224  # side that flow is resized to before a frame map is taken
RIM = 8  # pixels along the border that count as still
PREWITT_SLOPE = np.array([-1.0, 0.0, 1.0], dtype=np.float32)
PREWITT_SUM = np.ones(3, dtype=np.float32)


class MotionBoundary:
    """The magnitude of the motion boundary over the last `window` flows, one flow at a time.

    The boundary's sums are linear in the flow, so they are kept running: a flow costs two small
    filters whatever the window, and no more than `window` flows' filtered sums are held.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._gradients: deque[np.ndarray] = deque()
        self._sums: np.ndarray | None = None

    def add(self, flow_hw2: np.ndarray) -> np.ndarray | None:
        """Take the next flow, uint8 (H, W, 2).

        Returns:
            float32 (H, W, 2), magnitudes of the two components with their rim set to zero, of the
            window that ends here; None until a whole window has been seen.
        """
        gradients = _prewitt(flow_hw2)
        if self._sums is None:
            self._sums = np.zeros(gradients.shape, dtype=np.int32)
        self._sums += gradients
        self._gradients.append(gradients)
        if len(self._gradients) > self._window:
            self._sums -= self._gradients.popleft()
        if len(self._gradients) < self._window:
            return None
        # Not cv2.magnitude, whose last bit depends on where in memory its arguments lie: equal videos, equal bytes.
        squares = self._sums.astype(np.float32)
        squares *= squares
        squares[0] += squares[1]
        return _without_rim(np.sqrt(squares[0], out=squares[0]))


class MotionSummary:
    """Frame maps and clip scores of one video, taken while its flow streams past.

    Args:
        map_window: flows in the stack of a frame map (4, on UCF101 8).
        clip_window: flows in the stack of a clip score (32).
    """

    def __init__(self, map_window: int, clip_window: int) -> None:
        self._map_window = map_window
        self._map_boundary = MotionBoundary(map_window)
        self._clip_boundary = MotionBoundary(clip_window)
        self._window_maps: list[np.ndarray] = []
        self._scores: list[float] = []

    def add(self, flow_hw2: np.ndarray) -> None:
        """Take the next flow, uint8 (H, W, 2), horizontal then vertical."""
        magnitude = self._map_boundary.add(_resized(flow_hw2))
        if magnitude is not None:
            self._window_maps.append(_cells(magnitude))
        magnitude = self._clip_boundary.add(flow_hw2)
        if magnitude is not None:
            height, width, components = magnitude.shape
            self._scores.append(sum(cv2.sumElems(magnitude)) / (height * width * components))

    def frame_maps(self) -> np.ndarray:
        """uint8 (N, 7, 7), one per frame; at the ends the first or last whole window's."""
        num_windows = len(self._window_maps)
        starts = np.arange(num_windows + self._map_window - 1) + 1 - self._map_window // 2
        return np.asarray([self._window_maps[start] for start in starts.clip(0, num_windows - 1)])

    def clip_scores(self) -> np.ndarray:
        """float32 (N - window + 1,), the score of the clip that starts at each frame."""
        return np.array(self._scores, dtype=np.float32)


def summarise_motion(flow: Iterable[np.ndarray], map_window: int, clip_window: int) -> MotionSummary:
    """The summary of a whole flow, uint8 (N, H, W, 2) or an iterable of (H, W, 2), N >= both windows."""
    summary = MotionSummary(map_window, clip_window)
    for flow_hw2 in flow:
        summary.add(flow_hw2)
    return summary


def motion_target(flow: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """The alignment loss's target of each clip (METHOD.md, section 1.6).

    Args:
        flow: uint8 (B, T, H, W, 2), cropped, resized and mirrored like the clip's pixels.
        grid: (T', H', W') of the feature map; each must divide its side of the flow.

    Returns:
        float32 (B, T', H', W'): per group of T/T' frames the two components'
        magnitudes, added, as block means.
    """
    batch, frames, height, width, _ = flow.shape
    steps, rows, columns = grid
    if frames % steps or height % rows or width % columns:
        raise ValueError(f"a grid of {grid} does not divide a clip of {(frames, height, width)}")
    if not flow.is_cuda:
        return torch.from_numpy(np.stack([_clip_target(clip, grid) for clip in flow.numpy()]))
    # The boundary is linear in the flow: sum each group's frames first, filter once. Bytes add up exactly.
    groups = flow.reshape(batch * steps, frames // steps, height, width, 2).sum(dim=1, dtype=torch.int32)
    components = groups.permute(0, 3, 1, 2).float()
    magnitude = _boundary_magnitude(components)
    blocks = magnitude.reshape(batch, steps, 2, rows, height // rows, columns, width // columns)
    return blocks.mean(dim=(4, 6)).sum(dim=2)


def _clip_target(flow_thw2: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """One clip's target on a CPU, where OpenCV's filters are several times faster than sums in torch."""
    steps, rows, columns = grid
    target = np.zeros(grid, dtype=np.float32)
    for step, group in enumerate(np.split(flow_thw2, steps)):
        for component in np.moveaxis(group, -1, 0):
            plane = component.sum(axis=0, dtype=np.float32)
            slopes = ((PREWITT_SLOPE, PREWITT_SUM), (PREWITT_SUM, PREWITT_SLOPE))
            across, down = (cv2.sepFilter2D(plane, cv2.CV_32F, x, y, borderType=cv2.BORDER_REFLECT) for x, y in slopes)
            cells = (rows, plane.shape[0] // rows, columns, plane.shape[1] // columns)
            # Not cv2.magnitude, whose last bit depends on where in memory its arguments lie.
            magnitude = np.sqrt(across * across + down * down)
            target[step] += magnitude.reshape(cells).mean(axis=(1, 3))
    return target


def _boundary_magnitude(planes: torch.Tensor) -> torch.Tensor:
    """Magnitude of the Prewitt gradients of float planes (N, C, H, W).

    By shifted sums, which cost a tenth of a convolution with one channel.
    """
    # Repeating the edge sample is what mirroring means for a reach of one.
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    across = rows[..., 2:] - rows[..., :-2]
    down = columns[..., 2:, :] - columns[..., :-2, :]
    return across.square_().add_(down.square_()).sqrt_()


def _prewitt(flow_hw2: np.ndarray) -> np.ndarray:
    """Across and down gradients of both components: int16 (2, H, W, 2)."""
    slopes = ((PREWITT_SLOPE, PREWITT_SUM), (PREWITT_SUM, PREWITT_SLOPE))
    return np.stack([cv2.sepFilter2D(flow_hw2, cv2.CV_16S, x, y, borderType=cv2.BORDER_REFLECT) for x, y in slopes])


def _resized(flow_hw2: np.ndarray) -> np.ndarray:
    """Cubic, rounded to bytes: uint8 (224, 224, 2)."""
    # In float, because OpenCV's fixed-point cubic of bytes moves one cell in 20 of the frame maps.
    size = (MAP_SIZE, MAP_SIZE)
    resized = cv2.resize(flow_hw2.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.convertScaleAbs(resized.clip(min=0)))  # rounds half to even and cuts to 255


def _without_rim(magnitude: np.ndarray) -> np.ndarray:
    for edge in (np.s_[:RIM], np.s_[-RIM:], np.s_[:, :RIM], np.s_[:, -RIM:]):
        magnitude[edge] = 0
    return magnitude


def _cells(magnitude: np.ndarray) -> np.ndarray:
    """Block means of both components together, floored and cut to bytes: uint8 (7, 7)."""
    means = np.asarray(cv2.resize(magnitude, (MAP_CELLS, MAP_CELLS), interpolation=cv2.INTER_AREA)).mean(axis=2)
    return np.asarray(np.minimum(means, 255), dtype=np.uint8)

"""Motion of a video: frame maps, clip scores and training targets from flow bytes (METHOD.md, section 1).

A motion boundary is the gradient of the flow. The flow of a steadily moving camera is constant, so it cancels.
"""

from collections import deque
from collections.abc import Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the customary name

MAP_CELLS = 7
MAP_SIZE = 224  # pixels per side of the resized flow that frame maps are computed from
RIM = 8  # pixels along the border that are set to zero
PREWITT_SLOPE = np.array([-1.0, 0.0, 1.0], dtype=np.float32)
PREWITT_SUM = np.ones(3, dtype=np.float32)


class MotionBoundary:
    """The magnitude of the motion boundary over the last `window` flows, one flow at a time.

    The boundary is linear in the flow, so it is a running sum: a flow costs two small filters for any window, and
    the gradients of at most `window` flows are held.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._gradients: deque[np.ndarray] = deque()
        self._sums: np.ndarray | None = None

    def add(self, flow_hw2: np.ndarray) -> np.ndarray | None:
        """Add the next flow, uint8 (H, W, 2).

        Returns:
            float32 (H, W, 2), magnitudes of the two components over the window that ends here, with the rim set to
            zero; None before the first whole window.
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
        # Not cv2.magnitude: its last bit depends on the memory alignment, and equal videos must give equal bytes.
        squares = self._sums.astype(np.float32)
        squares *= squares
        squares[0] += squares[1]
        return _without_rim(np.sqrt(squares[0], out=squares[0]))


class MotionSummary:
    """Frame maps and clip scores of one video, computed from its flow as a stream.

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
        """Add the next flow, uint8 (H, W, 2), horizontal then vertical."""
        magnitude = self._map_boundary.add(_resize(flow_hw2))
        if magnitude is not None:
            self._window_maps.append(_pool_cells(magnitude))
        magnitude = self._clip_boundary.add(flow_hw2)
        if magnitude is not None:
            height, width, components = magnitude.shape
            self._scores.append(sum(cv2.sumElems(magnitude)) / (height * width * components))

    def frame_maps(self) -> np.ndarray:
        """uint8 (N, 7, 7), one per frame; frames near the ends repeat the map of the first or last whole window."""
        num_windows = len(self._window_maps)
        starts = np.arange(num_windows + self._map_window - 1) + 1 - self._map_window // 2
        return np.asarray([self._window_maps[start] for start in starts.clip(0, num_windows - 1)])

    def clip_scores(self) -> np.ndarray:
        """float32 (N - window + 1,), the score of the clip starting at each frame."""
        return np.array(self._scores, dtype=np.float32)


def summarise_motion(flow: Iterable[np.ndarray], map_window: int, clip_window: int) -> MotionSummary:
    """Summarise a whole flow, uint8 (N, H, W, 2) or an iterable of (H, W, 2), N >= both windows."""
    summary = MotionSummary(map_window, clip_window)
    for flow_hw2 in flow:
        summary.add(flow_hw2)
    return summary


def motion_target(flow: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Target of the alignment loss for each clip (METHOD.md, section 1.6).

    Args:
        flow: uint8 (B, T, H, W, 2), cropped, resized and mirrored like the pixels of the clip.
        grid: (T', H', W') of the feature map; each must divide the same axis of the flow.

    Returns:
        float32 (B, T', H', W'): block means of the sum of the two components' magnitudes, over each group of T/T'
        frames.

    Raises:
        ValueError: the grid does not divide the flow.
    """
    batch, frames, height, width, _ = flow.shape
    steps, rows, columns = grid
    if frames % steps or height % rows or width % columns:
        raise ValueError(f"a grid of {grid} does not divide a clip of {(frames, height, width)}")
    if not flow.is_cuda:
        return torch.from_numpy(np.stack([_clip_target(clip, grid) for clip in flow.numpy()]))
    # The boundary is linear in the flow: sum the frames of each group, then filter once. Sums of bytes are exact.
    groups = flow.reshape(batch * steps, frames // steps, height, width, 2).sum(dim=1, dtype=torch.int32)
    components = groups.permute(0, 3, 1, 2).float()
    magnitude = _boundary_magnitude(components)
    blocks = magnitude.reshape(batch, steps, 2, rows, height // rows, columns, width // columns)
    return blocks.mean(dim=(4, 6)).sum(dim=2)


def _clip_target(flow_thw2: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Target of one clip on a CPU, where OpenCV's filters are several times faster than sums in torch."""
    steps, rows, columns = grid
    target = np.zeros(grid, dtype=np.float32)
    for step, group in enumerate(np.split(flow_thw2, steps)):
        for component in np.moveaxis(group, -1, 0):
            summed = component.sum(axis=0, dtype=np.float32)
            slopes = ((PREWITT_SLOPE, PREWITT_SUM), (PREWITT_SUM, PREWITT_SLOPE))
            across, down = (cv2.sepFilter2D(summed, cv2.CV_32F, x, y, borderType=cv2.BORDER_REFLECT) for x, y in slopes)
            cells = (rows, summed.shape[0] // rows, columns, summed.shape[1] // columns)
            # Not cv2.magnitude: its last bit depends on the memory alignment.
            magnitude = np.sqrt(across * across + down * down)
            target[step] += magnitude.reshape(cells).mean(axis=(1, 3))
    return target


def _boundary_magnitude(components: torch.Tensor) -> torch.Tensor:
    """Magnitude of the Prewitt gradients of float components (N, C, H, W).

    Shifted sums cost a tenth of a one-channel convolution.
    """
    # With a padding of one, repeating the edge equals mirroring.
    padded = F.pad(components, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]
    across = rows[..., 2:] - rows[..., :-2]
    down = columns[..., 2:, :] - columns[..., :-2, :]
    return across.square_().add_(down.square_()).sqrt_()


def _prewitt(flow_hw2: np.ndarray) -> np.ndarray:
    """Horizontal and vertical gradients of both components: int16 (2, H, W, 2)."""
    slopes = ((PREWITT_SLOPE, PREWITT_SUM), (PREWITT_SUM, PREWITT_SLOPE))
    return np.stack([cv2.sepFilter2D(flow_hw2, cv2.CV_16S, x, y, borderType=cv2.BORDER_REFLECT) for x, y in slopes])


def _resize(flow_hw2: np.ndarray) -> np.ndarray:
    """Resize by cubic interpolation, rounded to bytes: uint8 (224, 224, 2)."""
    # In float: OpenCV's fixed-point cubic interpolation of bytes changes one cell in 20 of the frame maps.
    size = (MAP_SIZE, MAP_SIZE)
    resized = cv2.resize(flow_hw2.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.convertScaleAbs(resized.clip(min=0)))  # rounds half to even and clips to 255


def _without_rim(magnitude: np.ndarray) -> np.ndarray:
    for edge in (np.s_[:RIM], np.s_[-RIM:], np.s_[:, :RIM], np.s_[:, -RIM:]):
        magnitude[edge] = 0
    return magnitude


def _pool_cells(magnitude: np.ndarray) -> np.ndarray:
    """Block means over both components, floored and clipped to bytes: uint8 (7, 7)."""
    means = np.asarray(cv2.resize(magnitude, (MAP_CELLS, MAP_CELLS), interpolation=cv2.INTER_AREA)).mean(axis=2)
    return np.asarray(np.minimum(means, 255), dtype=np.uint8)

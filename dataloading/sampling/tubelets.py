"""Tubelets: three clips of a video and a crop of each view (METHOD.md, section 2).

Starts are 1-based, as in METHOD.md; frame indices are 0-based.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NUM_CLIPS = 3
# Query and first key are two crops of the first clip; second and third key are crops of the other two.
CLIP_OF_VIEW = (0, 0, 1, 2)

BEST_SHARE = 0.5  # of the starts of a half, by clip score
NUM_STRONGEST_CELLS = 4
# (largest number of cells of the motion region, share of it that a crop must cover)
REQUIRED_COVER = ((4, 0.9), (8, 0.8), (12, 0.7))
NUM_SHAPES = 20
NUM_POSITIONS = 40


class Box(NamedTuple):
    """A rectangle of a frame, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class MotionRegion(NamedTuple):
    """The part of a frame with most motion, in unrounded pixels; a crop must cover its share `cover` (0: none)."""

    top: float
    bottom: float
    left: float
    right: float
    cover: float


@dataclass(frozen=True)
class Tubelet:
    """One view: its frames, int64 (T,), 0-based, and their crop."""

    frames: np.ndarray
    box: Box


@dataclass(frozen=True)
class CutConfig:
    """How clips and crops are drawn.

    Attributes:
        frames, stride: of a clip.
        motion_probability: of a motion-focused draw of the starts.
        area: range of a crop's share of the frame.
        aspect: range of a crop's width over height.
        motion_crops: crops cover the motion region.
    """

    frames: int
    stride: int
    motion_probability: float
    area: tuple[float, float]
    aspect: tuple[float, float]
    motion_crops: bool = True

    @property
    def window(self) -> int:
        """Source frames in the span of a clip."""
        return self.frames * self.stride


def draw_tubelets(
    rng: np.random.Generator,
    config: CutConfig,
    *,
    frame_maps: np.ndarray,
    clip_scores: np.ndarray,
    height: int,
    width: int,
) -> tuple[int, tuple[Tubelet, ...]]:
    """Draw the order label of a video and its four views.

    Args:
        rng: the sample's generator.
        config: how to draw.
        frame_maps: (N, 7, 7), one motion map per frame.
        clip_scores: (N - window + 1,); index s - 1 holds the score of start s.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
    """
    order = int(rng.integers(2))
    span = {"num_frames": len(frame_maps), "window": config.window, "order": order}
    focused = rng.random() < config.motion_probability
    starts = draw_motion_starts(rng, clip_scores, **span) if focused else draw_uniform_starts(rng, **span)
    offsets = config.stride * np.arange(config.frames)
    clips = [start - 1 + offsets for start in starts]
    regions = [
        motion_region(frame_maps[frames].mean(axis=0), height, width)
        if config.motion_crops
        else whole_frame(height, width)
        for frames in clips
    ]
    views = tuple(
        Tubelet(
            clips[clip],
            draw_crop(rng, regions[clip], height=height, width=width, area=config.area, aspect=config.aspect),
        )
        for clip in CLIP_OF_VIEW
    )
    return order, views


def draw_clip(rng: np.random.Generator, config: CutConfig, *, num_frames: int, height: int, width: int) -> Tubelet:
    """Draw one clip for a classifier: uniform start, random crop (METHOD.md, section 6).

    A video shorter than a clip's window is stretched to at least the window: each frame is repeated.
    """
    repeats = -(-config.window // num_frames)
    start = int(rng.integers(num_frames * repeats - config.window, endpoint=True))
    frames: np.ndarray = (start + config.stride * np.arange(config.frames)) // repeats
    region = whole_frame(height, width)
    return Tubelet(frames, draw_crop(rng, region, height=height, width=width, area=config.area, aspect=config.aspect))


def draw_motion_starts(
    rng: np.random.Generator, clip_scores: np.ndarray, *, num_frames: int, window: int, order: int
) -> np.ndarray:
    """Draw three starts, int64 (3,), each uniform among the best half, by clip score, of its half of the video.

    The first clip comes from the first half if `order` is 1, from the second if it is 0; the other two come from the
    other half, sorted. A video of less than two windows falls back to `draw_uniform_starts`.
    """
    if num_frames < 2 * window:
        return draw_uniform_starts(rng, num_frames=num_frames, window=window, order=order)
    return _draw_from_halves(rng, *best_starts(clip_scores, num_frames=num_frames, window=window), order)


def best_starts(clip_scores: np.ndarray, *, num_frames: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidate starts of a motion-focused draw in each half of a video of two windows or more.

    Returns:
        starts of the first half, int64 (any,), and of the second, best first.
    """
    middle = num_frames // 2
    first = np.arange(1, middle - window + 1)
    second = np.arange(middle, num_frames - window)
    if not len(first) or not len(second):
        return np.array([1]), np.array([window])
    num_best = int(BEST_SHARE * len(first)) + 1
    return _best(first, clip_scores, num_best), _best(second, clip_scores, num_best)


def draw_uniform_starts(rng: np.random.Generator, *, num_frames: int, window: int, order: int) -> np.ndarray:
    """Draw three starts, int64 (3,), as `draw_motion_starts` does, but uniform in each half.

    In a video of less than two windows the three are uniform over the video: ascending if `order` is 1, else the
    largest, the smallest and the middle one.
    """
    if num_frames < 2 * window:
        # A video of exactly one window has only start 1.
        drawn = np.sort(rng.integers(1, max(num_frames - window, 1), size=NUM_CLIPS, endpoint=True))
        return drawn if order else drawn[[2, 0, 1]]
    middle = num_frames // 2
    first = np.arange(1, middle - window + 2)
    second = np.arange(middle, num_frames - window + 1)
    return _draw_from_halves(rng, first, second, order)


def motion_region(mean_map: np.ndarray, height: int, width: int) -> MotionRegion:
    """The bounding box of the 4 strongest cells of a (7, 7) map, in pixels; ties go to the earlier cell.

    Without any motion it is `whole_frame`.
    """
    rows, columns = mean_map.shape
    if not mean_map.any():
        return whole_frame(height, width)
    strongest = np.argsort(-mean_map.ravel(), kind="stable")[:NUM_STRONGEST_CELLS]
    row, column = np.divmod(strongest, columns)
    top, bottom = int(row.min()), int(row.max()) + 1
    left, right = int(column.min()), int(column.max()) + 1
    num_cells = (bottom - top) * (right - left)
    cover = next((share for most, share in REQUIRED_COVER if num_cells <= most), 0.0)
    return MotionRegion(
        top * height / rows, bottom * height / rows, left * width / columns, right * width / columns, cover
    )


def whole_frame(height: int, width: int) -> MotionRegion:
    """The whole frame, with no share that a crop must cover."""
    return MotionRegion(0.0, height, 0.0, width, 0.0)


def draw_crop(
    rng: np.random.Generator,
    region: MotionRegion,
    *,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """Draw a crop of random shape; of 40 random positions it takes the first that covers the motion region.

    If none covers enough of it, the crop takes the position that covers most; if no shape fits into the frame, it
    contains the region.
    """
    log_aspect = np.log(aspect)
    for _ in range(NUM_SHAPES):
        pixels = rng.uniform(*area) * height * width
        ratio = np.exp(rng.uniform(*log_aspect))
        crop_width, crop_height = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            tops = rng.integers(0, height - crop_height, size=NUM_POSITIONS, endpoint=True)
            lefts = rng.integers(0, width - crop_width, size=NUM_POSITIONS, endpoint=True)
            chosen = _best_position(region, tops, lefts, crop_height, crop_width)
            return Box(int(tops[chosen]), int(lefts[chosen]), crop_height, crop_width)
    return _draw_containing_crop(rng, region, height, width)


def _draw_from_halves(rng: np.random.Generator, first: np.ndarray, second: np.ndarray, order: int) -> np.ndarray:
    single, pair = (first, second) if order else (second, first)
    return np.concatenate([rng.choice(single, size=1), np.sort(rng.choice(pair, size=2))])


def _best(starts: np.ndarray, clip_scores: np.ndarray, count: int) -> np.ndarray:
    ranked: np.ndarray = starts[np.argsort(-clip_scores[starts - 1], kind="stable")]
    return ranked[:count]


def _best_position(region: MotionRegion, tops: np.ndarray, lefts: np.ndarray, crop_height: int, crop_width: int) -> int:
    """Index of the first position that covers enough of the region, else of the first that covers most."""
    if not region.cover:
        return 0
    cover = _covered_share(tops, crop_height, region.top, region.bottom) * _covered_share(
        lefts, crop_width, region.left, region.right
    )
    enough = cover >= region.cover
    return int(np.argmax(enough if enough.any() else cover))


def _covered_share(starts: np.ndarray, size: int, low: float, high: float) -> np.ndarray:
    """Share of [low, high] inside [start, start + size], along one axis."""
    overlap: np.ndarray = np.minimum(starts + size, high) - np.maximum(starts, low)
    return overlap.clip(min=0) / (high - low)


def _draw_containing_crop(rng: np.random.Generator, region: MotionRegion, height: int, width: int) -> Box:
    """A crop that contains the region: one corner is the region's, the opposite one is drawn outwards."""
    top, left = int(region.top), int(region.left)
    bottom, right = int(np.ceil(region.bottom)), int(np.ceil(region.right))
    if rng.integers(2):
        bottom = int(rng.integers(bottom, height, endpoint=True))
        right = int(rng.integers(right, width, endpoint=True))
    else:
        top = int(rng.integers(0, top, endpoint=True))
        left = int(rng.integers(0, left, endpoint=True))
    return Box(top, left, bottom - top, right - left)

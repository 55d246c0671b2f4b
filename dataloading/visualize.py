"""What there is to look at of a shard set's video: moments of it, its motion, and the tubelets of one draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from dataloading.flow.colours import flow_colours
from dataloading.flow.estimators import flow_pixels
from dataloading.loader.augment import AugmentConfig
from dataloading.loader.dali_decoder import StillDecoder
from dataloading.reading.shard_set import ShardSet, StoredVideo
from dataloading.sampling.epoch_order import sample_generator
from dataloading.sampling.tubelets import CutConfig, MotionRegion, Tubelet, best_starts, draw_tubelets, motion_region
from mcl_dist.errors import UserError

VIEWS = ("query", "first key", "second key", "third key")
NUM_MOMENTS = 8
NUM_VIEW_FRAMES = 3
PICTURE_SIDE = 208  # longer side of a picture, pixels
CUT_OUT_SIDE = 144
CLIP_FRAMES = 16
# A few pixels are always wrong; the wheel's rim is the speed that all but these keep to.
FAST_PERCENTILE = 99.0
SLOWEST_RIM = 1.0  # pixels a frame: flow's bytes are 0.16 apart, and such noise should look pale


@dataclass(frozen=True)
class Moment:
    """A frame of a video: its number, its picture and its flow in colours, uint8 (h, w, 3) RGB, and its
    frame map, uint8 (7, 7).
    """

    frame: int
    picture: np.ndarray
    flow: np.ndarray
    motion: np.ndarray


@dataclass(frozen=True)
class TubeletView:
    """A tubelet, where its clip moves most, and some of its frames: whole and cut out, uint8 (h, w, 3) RGB."""

    name: str
    tubelet: Tubelet
    region: MotionRegion
    moments: tuple[tuple[int, np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class InspectedVideo:
    """One video of a set, small enough to be shown.

    Attributes:
        position, key: in the set.
        label, class_name: of the video.
        info: what its json says.
        height, width, flow_height, flow_width: in pixels.
        frame_maps: uint8 (N, 7, 7).
        clip_scores: float32 (N - window + 1,).
        window: frames that a clip spans.
        candidates: 0-based starts that a motion-focused draw chooses among; empty under two windows.
        order: the draw's order label.
        rim: pixels a frame at the rim of the moments' colour wheel.
        moments: evenly spaced over the video.
        views: the draw's four.
    """

    position: int
    key: str
    label: int
    class_name: str
    info: dict[str, Any]
    height: int
    width: int
    flow_height: int
    flow_width: int
    frame_maps: np.ndarray
    clip_scores: np.ndarray
    window: int
    candidates: np.ndarray
    order: int
    rim: float
    moments: tuple[Moment, ...]
    views: tuple[TubeletView, ...]


def sample_positions(num_videos: int, count: int, seed: int) -> list[int]:
    """At most `count` positions of a set, drawn without repetition, ascending."""
    drawn = np.random.default_rng(seed).choice(num_videos, size=min(count, num_videos), replace=False)
    return sorted(drawn.tolist())


def inspect_video(shard_set: ShardSet, position: int, seed: int) -> InspectedVideo:
    """Look at one video; its tubelets are a motion-focused draw by this seed.

    Raises:
        UserError: the set cannot be read, or does not hold what it says.
    """
    video = shard_set.read(position)
    window = video.num_frames - len(video.clip_scores) + 1
    if not 1 <= window <= video.num_frames:
        raise UserError(f"{video.where}: its clip scores do not fit its {video.num_frames} frames; rebuild the set")
    order, tubelets = draw_tubelets(
        sample_generator(seed, 0, position),
        cut_config(window),
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        height=video.height,
        width=video.width,
    )
    label = int(shard_set.labels[position])
    rim, moments = _moments(video)
    return InspectedVideo(
        position=position,
        key=str(shard_set.keys[position]),
        label=label,
        class_name=shard_set.manifest.classes[label],
        info=video.info(),
        height=video.height,
        width=video.width,
        flow_height=video.flow_height,
        flow_width=video.flow_width,
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        window=window,
        candidates=_candidates(video, window),
        order=order,
        rim=rim,
        moments=moments,
        views=_views(video, tubelets),
    )


def cut_config(window: int) -> CutConfig:
    """Clips of that window, of 16 frames where it allows, always drawn by motion; crops as pre-training's."""
    stride = 1 if window % CLIP_FRAMES else window // CLIP_FRAMES
    crops = AugmentConfig()
    return CutConfig(
        frames=window // stride, stride=stride, motion_probability=1.0, area=crops.area, aspect=crops.aspect
    )


def decoded(
    stills: Sequence[np.ndarray], windows: np.ndarray, size: tuple[int, int], *, grey: bool = False
) -> np.ndarray:
    """Pixels of windows, (N, 4) top, left, height, width, of stills at a size: uint8 (N, height, width, 3 or 1)."""
    decoder = StillDecoder(size=size, grey=grey, device=torch.device("cpu"), threads=1)
    try:
        return decoder(stills, windows).numpy()
    finally:
        decoder.close()


def decoded_frames(video: StoredVideo, frames: Sequence[int]) -> np.ndarray:
    """Whole frames of a video at their size, uint8 (N, H, W, 3)."""
    size = (video.height, video.width)
    return decoded(video.frames(frames), np.tile((0, 0, *size), (len(frames), 1)), size)


def decoded_flow(video: StoredVideo, frames: Sequence[int]) -> np.ndarray:
    """Flow of these frames, float32 (N, h, w, 2), in pixels to the right and down."""
    size = (2 * video.flow_height, video.flow_width)
    stills = decoded(video.flow(frames), np.tile((0, 0, *size), (len(frames), 1)), size, grey=True)
    halves = stills.reshape(len(frames), 2, video.flow_height, video.flow_width)
    return flow_pixels(np.moveaxis(halves, 1, 3))


def pictures(video: StoredVideo, count: int, side: int) -> list[np.ndarray]:
    """Evenly spaced frames of a video, uint8 (h, w, 3), the longer side no longer than `side`."""
    frames = _evenly(range(video.num_frames), count)
    return [_shrunk(picture, side) for picture in decoded_frames(video, frames)]


def _candidates(video: StoredVideo, window: int) -> np.ndarray:
    if video.num_frames < 2 * window:
        return np.zeros(0, dtype=np.int64)
    halves = best_starts(video.clip_scores, num_frames=video.num_frames, window=window)
    return np.sort(np.concatenate(halves)) - 1


def _moments(video: StoredVideo) -> tuple[float, tuple[Moment, ...]]:
    frames = _evenly(range(video.num_frames), NUM_MOMENTS)
    flow = decoded_flow(video, frames)
    rim = max(float(np.percentile(np.linalg.norm(flow, axis=3), FAST_PERCENTILE)), SLOWEST_RIM)
    moments = (
        Moment(frame, _shrunk(picture, PICTURE_SIDE), _shrunk(flow_colours(flow_hw2, rim), PICTURE_SIDE), motion)
        for frame, picture, flow_hw2, motion in zip(
            frames, decoded_frames(video, frames), flow, video.frame_maps[frames], strict=True
        )
    )
    return rim, tuple(moments)


def _views(video: StoredVideo, tubelets: Sequence[Tubelet]) -> tuple[TubeletView, ...]:
    views = []
    for name, tubelet in zip(VIEWS, tubelets, strict=True):
        frames = _evenly(tubelet.frames.tolist(), NUM_VIEW_FRAMES)
        boxes = np.tile(tubelet.box, (len(frames), 1))
        cut_outs = decoded(video.frames(frames), boxes, (CUT_OUT_SIDE, CUT_OUT_SIDE))
        pictures = [_shrunk(picture, PICTURE_SIDE) for picture in decoded_frames(video, frames)]
        region = motion_region(video.frame_maps[tubelet.frames].mean(axis=0), video.height, video.width)
        views.append(TubeletView(name, tubelet, region, tuple(zip(frames, pictures, cut_outs, strict=True))))
    return tuple(views)


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places.tolist()]


def _shrunk(picture_hw3: np.ndarray, side: int) -> np.ndarray:
    """With the longer side no longer than `side`."""
    height, width = picture_hw3.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return picture_hw3
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(cv2.resize(picture_hw3, size, interpolation=cv2.INTER_AREA))

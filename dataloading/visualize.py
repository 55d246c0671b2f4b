"""Images of a video in a shard set: sampled frames, their flow and motion, and the tubelets of one draw."""

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
NUM_FRAMES = 8
NUM_VIEW_FRAMES = 3
IMAGE_SIDE = 208  # maximum length of the longer side, pixels
CROP_SIDE = 144
CLIP_FRAMES = 16
# The rim of the colour wheel is a speed that all but a few outliers stay below.
FAST_PERCENTILE = 99.0
MIN_MAX_SPEED = 1.0  # pixels per frame: bytes of flow are 0.16 px apart, and their noise should look pale


@dataclass(frozen=True)
class FrameImages:
    """A frame of a video: number, image and flow in colours, both RGB uint8 (h, w, 3), and frame map, uint8 (7, 7)."""

    frame: int
    image: np.ndarray
    flow_image: np.ndarray
    frame_map: np.ndarray


@dataclass(frozen=True)
class TubeletImages:
    """A view's tubelet, the region of most motion of its clip, and some frames: number, whole image and crop.

    Images are RGB, uint8 (h, w, 3).
    """

    name: str
    tubelet: Tubelet
    region: MotionRegion
    frame_images: tuple[tuple[int, np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class VideoInspection:
    """Facts and small images of one video of a set.

    Attributes:
        position, key: position and key in the set.
        label, class_name: class of the video.
        info: contents of its json.
        height, width, flow_height, flow_width: sizes in pixels.
        frame_maps: uint8 (N, 7, 7).
        clip_scores: float32 (N - window + 1,).
        window: frames that a clip spans.
        candidates: 0-based starts that a motion-focused draw chooses from; empty for less than two windows.
        order: order label of the draw.
        max_speed: pixels per frame at the rim of the colour wheel of `frame_images`.
        frame_images: frames evenly spaced over the video.
        views: the four views of the draw.
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
    max_speed: float
    frame_images: tuple[FrameImages, ...]
    views: tuple[TubeletImages, ...]


def sample_positions(num_videos: int, count: int, seed: int) -> list[int]:
    """Draw at most `count` positions of a set without repetition, ascending."""
    drawn = np.random.default_rng(seed).choice(num_videos, size=min(count, num_videos), replace=False)
    return sorted(drawn.tolist())


def inspect_video(shard_set: ShardSet, position: int, seed: int) -> VideoInspection:
    """Read one video and draw its tubelets, motion-focused and by this seed.

    Raises:
        UserError: the set is unreadable or damaged.
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
    max_speed, frame_images = _frame_images(video)
    return VideoInspection(
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
        max_speed=max_speed,
        frame_images=frame_images,
        views=_tubelet_images(video, tubelets),
    )


def cut_config(window: int) -> CutConfig:
    """Clips that span the window, of 16 frames if they divide it, always drawn by motion; crops as in pre-training."""
    stride = 1 if window % CLIP_FRAMES else window // CLIP_FRAMES
    crops = AugmentConfig()
    return CutConfig(
        frames=window // stride, stride=stride, motion_probability=1.0, area=crops.area, aspect=crops.aspect
    )


def decode_windows(
    stills: Sequence[np.ndarray], windows: np.ndarray, size: tuple[int, int], *, grey: bool = False
) -> np.ndarray:
    """Decode one window, (top, left, height, width), of each still, and resize it: uint8 (N, height, width, 3 or 1)."""
    decoder = StillDecoder(size=size, grey=grey, device=torch.device("cpu"), threads=1)
    try:
        return decoder(stills, windows).numpy()
    finally:
        decoder.close()


def decode_frames(video: StoredVideo, frames: Sequence[int]) -> np.ndarray:
    """Decode whole frames of a video at their own size, uint8 (N, H, W, 3)."""
    size = (video.height, video.width)
    return decode_windows(video.frames(frames), np.tile((0, 0, *size), (len(frames), 1)), size)


def decode_flow(video: StoredVideo, frames: Sequence[int]) -> np.ndarray:
    """Decode the flow of frames, float32 (N, h, w, 2), in pixels to the right and down."""
    size = (2 * video.flow_height, video.flow_width)
    stills = decode_windows(video.flow(frames), np.tile((0, 0, *size), (len(frames), 1)), size, grey=True)
    halves = stills.reshape(len(frames), 2, video.flow_height, video.flow_width)
    return flow_pixels(np.moveaxis(halves, 1, 3))


def evenly_spaced_frames(video: StoredVideo, count: int, side: int) -> list[np.ndarray]:
    """Decode `count` frames evenly spaced over a video, uint8 (h, w, 3), the longer side at most `side`."""
    frames = _evenly_spaced(range(video.num_frames), count)
    return [_shrink(image, side) for image in decode_frames(video, frames)]


def _candidates(video: StoredVideo, window: int) -> np.ndarray:
    if video.num_frames < 2 * window:
        return np.zeros(0, dtype=np.int64)
    halves = best_starts(video.clip_scores, num_frames=video.num_frames, window=window)
    return np.sort(np.concatenate(halves)) - 1


def _frame_images(video: StoredVideo) -> tuple[float, tuple[FrameImages, ...]]:
    """The speed at the rim of the colour wheel, and the frames."""
    frames = _evenly_spaced(range(video.num_frames), NUM_FRAMES)
    flow = decode_flow(video, frames)
    max_speed = max(float(np.percentile(np.linalg.norm(flow, axis=3), FAST_PERCENTILE)), MIN_MAX_SPEED)
    frame_images = (
        FrameImages(
            frame, _shrink(image, IMAGE_SIDE), _shrink(flow_colours(flow_hw2, max_speed), IMAGE_SIDE), frame_map
        )
        for frame, image, flow_hw2, frame_map in zip(
            frames, decode_frames(video, frames), flow, video.frame_maps[frames], strict=True
        )
    )
    return max_speed, tuple(frame_images)


def _tubelet_images(video: StoredVideo, tubelets: Sequence[Tubelet]) -> tuple[TubeletImages, ...]:
    views = []
    for name, tubelet in zip(VIEWS, tubelets, strict=True):
        frames = _evenly_spaced(tubelet.frames.tolist(), NUM_VIEW_FRAMES)
        boxes = np.tile(tubelet.box, (len(frames), 1))
        crops = decode_windows(video.frames(frames), boxes, (CROP_SIDE, CROP_SIDE))
        images = [_shrink(image, IMAGE_SIDE) for image in decode_frames(video, frames)]
        region = motion_region(video.frame_maps[tubelet.frames].mean(axis=0), video.height, video.width)
        views.append(TubeletImages(name, tubelet, region, tuple(zip(frames, images, crops, strict=True))))
    return tuple(views)


def _evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, with the first and the last."""
    positions = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[position] for position in positions.tolist()]


def _shrink(image_hw3: np.ndarray, side: int) -> np.ndarray:
    """Limit the longer side to `side`."""
    height, width = image_hw3.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image_hw3
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(cv2.resize(image_hw3, size, interpolation=cv2.INTER_AREA))

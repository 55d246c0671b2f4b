"""Renders synthetic videos: a striped disc whose classes differ only in motion.

Mirroring a video keeps its class, so a mirrored view never contradicts its label. In the scenes `demo` and `alike` all
videos look the same, so an encoder can learn only motion from them. In `distracting` everything but the disc differs
from video to video and hardly moves, so instance discrimination can ignore the motion.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

# Frames of one period: a clip of 16 frames at stride 2 sees 1 period, about 1.5, and about 2.5.
PERIODS = {"slow": 32.0, "medium": 20.4, "fast": 13.0}
PERIOD_SPREAD = (0.85, 1.18)  # random factor of the period of a video; the ranges of two speeds do not overlap
NOISE_GRIDS = (6, 12, 24, 48)  # coarse to fine; every octave has half the strength of the one before

DEMO_FRAMES = 72  # more than two windows of 32 frames, so each half has room for a clip
DEMO_SIZE = 56  # pixels; crops of 48 can vary in position
DEMO_STRIPE = 8.0  # pixels from one black stripe to the next
DEMO_PAN = 1.5  # maximum pixels per frame of the camera pan, which motion boundaries cancel

DISTRACTING_FRAMES = 128
DISTRACTING_SIZE = 64
DISTRACTING_STRIPE = 6.0
DISTRACTING_PAN = 0.1
MOVING_FRAMES = 32  # in each half; before and after the disc rests
NUM_SHAPES = 8


@dataclass(frozen=True)
class Scene:
    """A kind of video: its class names, and a function that renders a video of a class, uint8 (N, H, W[, 3])."""

    classes: tuple[str, ...]
    render: Callable[[str, np.random.Generator], NDArray[np.uint8]]


@dataclass(frozen=True)
class Pose:
    """The disc in one frame: offset from its home in pixels, scale along each axis, rotation in radians."""

    x: float = 0.0
    y: float = 0.0
    scale_x: float = 1.0
    scale_y: float = 1.0
    rotation: float = 0.0


# Arguments: phase in radians, amplitude in pixels, and a sign for the direction of the diagonal or the rotation.
MOTIONS: dict[str, Callable[[float, float, int], Pose]] = {
    "across": lambda phase, reach, _: Pose(x=reach * np.sin(phase)),
    "down": lambda phase, reach, _: Pose(y=reach * np.sin(phase)),
    "diagonal": lambda phase, reach, sign: Pose(
        x=sign * reach * np.sin(phase) / np.sqrt(2), y=reach * np.sin(phase) / np.sqrt(2)
    ),
    "orbit": lambda phase, reach, sign: Pose(x=sign * reach * np.cos(phase), y=reach * np.sin(phase)),
    "spin": lambda phase, _, sign: Pose(rotation=sign * phase),
    "pulse": lambda phase, reach, _: Pose(
        scale_x=1 + reach * np.sin(phase) / 24, scale_y=1 + reach * np.sin(phase) / 24
    ),
    "eight": lambda phase, reach, sign: Pose(x=sign * reach * np.sin(phase), y=reach * np.sin(2 * phase) / 2),
    "stretch": lambda phase, reach, _: Pose(
        scale_x=1 + reach * np.sin(phase) / 24, scale_y=1 - reach * np.sin(phase) / 24
    ),
}


def render_alike(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render a video of a class, grey uint8 (72, 56, 56): a large disc over noise that pans at a constant speed."""
    motion, speed = name.split("_")
    step = 2 * np.pi / (PERIODS[speed] * rng.uniform(*PERIOD_SPREAD))
    start, reach, sign = rng.uniform(0, 2 * np.pi), rng.uniform(8, 12), int(rng.choice((-1, 1)))
    radius, home = rng.uniform(9, 12), rng.uniform(22, 34, size=2)
    canvas = _noise(rng, _canvas_size(DEMO_SIZE, DEMO_PAN, DEMO_FRAMES), middle=127.5, strength=40)
    frames = np.empty((DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE), np.uint8)
    for index, background in enumerate(_pan(rng, canvas, DEMO_SIZE, DEMO_PAN, DEMO_FRAMES)):
        pose = MOTIONS[motion](start + index * step, reach, sign)
        disc, cover = _disc(pose, home, radius, size=DEMO_SIZE, stripe=DEMO_STRIPE)
        frames[index] = np.rint(background + cover * (disc - background))
    return frames


def render_distracting(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render a video of a class, RGB uint8 (128, 64, 64, 3).

    A small grey striped disc moves during 32 frames of each half. Texture, shapes and colours of the background are
    random for each video, and hardly move.
    """
    motion, speed = name.split("_")
    step = 2 * np.pi / (PERIODS[speed] * rng.uniform(*PERIOD_SPREAD))
    start, reach, sign = rng.uniform(0, 2 * np.pi), rng.uniform(7, 10), int(rng.choice((-1, 1)))
    radius, home = rng.uniform(8, 10), rng.uniform(20, DISTRACTING_SIZE - 20, size=2)
    phases = start + step * np.cumsum(_moving_frames(rng))
    canvas = _distracting_canvas(rng, _canvas_size(DISTRACTING_SIZE, DISTRACTING_PAN, DISTRACTING_FRAMES))
    frames = np.empty((DISTRACTING_FRAMES, DISTRACTING_SIZE, DISTRACTING_SIZE, 3), np.uint8)
    backgrounds = _pan(rng, canvas, DISTRACTING_SIZE, DISTRACTING_PAN, DISTRACTING_FRAMES)
    for index, background in enumerate(backgrounds):
        pose = MOTIONS[motion](phases[index], reach, sign)
        disc, cover = _disc(pose, home, radius, size=DISTRACTING_SIZE, stripe=DISTRACTING_STRIPE)
        frames[index] = np.rint(background + cover[..., None] * (disc[..., None] - background))
    return frames


def class_names(speeds: tuple[str, ...]) -> tuple[str, ...]:
    """Class names: every motion at each of the speeds."""
    return tuple(f"{motion}_{speed}" for motion in MOTIONS for speed in speeds)


SCENES = {
    "demo": Scene(class_names(("slow", "fast")), render_alike),
    "alike": Scene(class_names(tuple(PERIODS)), render_alike),
    "distracting": Scene(class_names(tuple(PERIODS)), render_distracting),
}


def _disc(
    pose: Pose, home: NDArray[np.float64], radius: float, *, size: int, stripe: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Grey values of the striped disc, and how far (0 to 1) it covers each pixel: both (size, size)."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    y, x = y - home[1] - pose.y, x - home[0] - pose.x
    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    u = (x * cos + y * sin) / pose.scale_x
    v = (y * cos - x * sin) / pose.scale_y
    stripes = np.clip(3 * np.sin(2 * np.pi * u / stripe), -1, 1)
    cover = np.clip((radius - np.hypot(u, v)) * min(pose.scale_x, pose.scale_y) + 0.5, 0, 1)
    return 127.5 + 120 * stripes, cover


def _moving_frames(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Whether the disc moves in each frame (N,): for `MOVING_FRAMES` frames at a random place of each half."""
    moving = np.zeros((2, DISTRACTING_FRAMES // 2), bool)
    for half in moving:
        start = rng.integers(0, len(half) - MOVING_FRAMES, endpoint=True)
        half[start : start + MOVING_FRAMES] = True
    return moving.ravel()


def _distracting_canvas(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A coloured texture (size, size, 3) with triangles, squares and discs."""
    colours = [_noise(rng, size, middle=middle, strength=60) for middle in rng.uniform(60, 195, size=3)]
    canvas = np.ascontiguousarray(np.stack(colours, axis=-1).clip(0, 255))
    for _ in range(NUM_SHAPES):
        x, y = rng.uniform(0, size, size=2)
        reach, rotation, colour = rng.uniform(4, 9), rng.uniform(0, 2 * np.pi), rng.uniform(0, 255, size=3)
        corners = rng.choice((3, 4, 24))  # 24 corners look like a disc
        angles = rotation + 2 * np.pi * np.arange(corners) / corners
        outline = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=-1)
        cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], colour.tolist())
    return canvas


def _canvas_size(size: int, max_pan: float, num_frames: int) -> int:
    """Size of a background that contains every frame of any pan."""
    return size + 2 * int(np.ceil(max_pan * num_frames / 2)) + 2


def _noise(rng: np.random.Generator, size: int, *, middle: float, strength: float) -> NDArray[np.float32]:
    """Still noise (size, size) of several octaves."""
    canvas = np.full((size, size), middle, np.float32)
    for octave, grid in enumerate(NOISE_GRIDS):
        noise = rng.uniform(-strength, strength, size=(grid, grid)).astype(np.float32) / 2**octave
        canvas += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return canvas


def _pan(
    rng: np.random.Generator, canvas: NDArray[np.float32], size: int, max_pan: float, num_frames: int
) -> Iterator[NDArray[np.float64]]:
    """Yield the background of every frame (size, size, …): a window that pans over the canvas at a constant speed."""
    speed, direction = rng.uniform(0, max_pan), rng.uniform(0, 2 * np.pi)
    for index in range(num_frames):
        shift = speed * (index - (num_frames - 1) / 2)
        middle = (len(canvas) - 1) / 2
        centre = (middle + shift * np.cos(direction), middle + shift * np.sin(direction))
        yield cv2.getRectSubPix(canvas, (size, size), centre).astype(np.float64)

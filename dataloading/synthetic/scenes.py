"""What synthetic videos show: a striped disc whose motion alone tells the classes apart.

The motions look the same in a mirror, so a mirrored view never contradicts its label. In the scenes `demo` and `alike`
all videos look the same, so whatever an encoder learns of them it learns of motion. In `distracting` everything but the
disc differs from video to video and mostly stands still, so that instance discrimination can do without the motion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

# Frames of one turn: a clip of 16 frames at stride 2, about 1.5 turns of such a clip, and about 2.5.
PERIODS = {"slow": 32.0, "medium": 20.4, "fast": 13.0}
PERIOD_SPREAD = (0.85, 1.18)  # the periods stay apart, yet no video has exactly any of them
NOISE_GRIDS = (6, 12, 24, 48)  # coarse to fine; every octave half as strong as the one before

DEMO_FRAMES = 72  # two windows of 32 frames and some: room for one clip from each half
DEMO_SIZE = 56  # pixels; a crop of 48 leaves the tubelets room to move
DEMO_STRIPE = 8.0  # pixels from one black stripe to the next
DEMO_PAN = 1.5  # pixels a frame at most; a steady camera's share of the flow, which motion boundaries cancel

DISTRACTING_FRAMES = 128
DISTRACTING_SIZE = 64
DISTRACTING_STRIPE = 6.0
DISTRACTING_PAN = 0.1
MOVING_FRAMES = 32  # of each half; the disc rests before and after
NUM_SHAPES = 8


@dataclass(frozen=True)
class Scene:
    """A kind of video: the names of its classes, and what draws one of a class, uint8 (N, H, W) or (N, H, W, 3)."""

    classes: tuple[str, ...]
    render: Callable[[str, np.random.Generator], NDArray[np.uint8]]


@dataclass(frozen=True)
class Pose:
    """Where the disc is in one frame: offset from its home and size along each axis, turn in radians."""

    across: float = 0.0
    down: float = 0.0
    wide: float = 1.0
    tall: float = 1.0
    turn: float = 0.0


# Each takes the phase in radians, the amplitude in pixels and a sign (the diagonal's way, the turn's sense).
MOTIONS: dict[str, Callable[[float, float, int], Pose]] = {
    "across": lambda phase, reach, _: Pose(across=reach * np.sin(phase)),
    "down": lambda phase, reach, _: Pose(down=reach * np.sin(phase)),
    "diagonal": lambda phase, reach, sign: Pose(
        across=sign * reach * np.sin(phase) / np.sqrt(2), down=reach * np.sin(phase) / np.sqrt(2)
    ),
    "orbit": lambda phase, reach, sign: Pose(across=sign * reach * np.cos(phase), down=reach * np.sin(phase)),
    "spin": lambda phase, _, sign: Pose(turn=sign * phase),
    "pulse": lambda phase, reach, _: Pose(wide=1 + reach * np.sin(phase) / 24, tall=1 + reach * np.sin(phase) / 24),
    "eight": lambda phase, reach, sign: Pose(across=sign * reach * np.sin(phase), down=reach * np.sin(2 * phase) / 2),
    "stretch": lambda phase, reach, _: Pose(wide=1 + reach * np.sin(phase) / 24, tall=1 - reach * np.sin(phase) / 24),
}


def render_alike(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one video of a class: uint8 (72, 56, 56), grey; a large disc over noise that pans steadily."""
    motion, speed = name.split("_")
    step = 2 * np.pi / (PERIODS[speed] * rng.uniform(*PERIOD_SPREAD))
    start, reach, sign = rng.uniform(0, 2 * np.pi), rng.uniform(8, 12), int(rng.choice((-1, 1)))
    radius, home = rng.uniform(9, 12), rng.uniform(22, 34, size=2)
    canvas = _noise(rng, _canvas_size(DEMO_SIZE, DEMO_PAN, DEMO_FRAMES), middle=127.5, strength=40)
    frames = np.empty((DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE), np.uint8)
    for index, background in enumerate(_panned(rng, canvas, DEMO_SIZE, DEMO_PAN, DEMO_FRAMES)):
        pose = MOTIONS[motion](start + index * step, reach, sign)
        disc, cover = _disc(pose, home, radius, size=DEMO_SIZE, stripe=DEMO_STRIPE)
        frames[index] = np.rint(background + cover * (disc - background))
    return frames


def render_distracting(name: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one video of a class: uint8 (128, 64, 64, 3).

    A small disc, grey and striped like all others', moves during 32 frames of each half, over a texture with shapes in
    it whose places and colours are this video's own, and which hardly move.
    """
    motion, speed = name.split("_")
    step = 2 * np.pi / (PERIODS[speed] * rng.uniform(*PERIOD_SPREAD))
    start, reach, sign = rng.uniform(0, 2 * np.pi), rng.uniform(7, 10), int(rng.choice((-1, 1)))
    radius, home = rng.uniform(8, 10), rng.uniform(20, DISTRACTING_SIZE - 20, size=2)
    phases = start + step * np.cumsum(_moving(rng))
    canvas = _distracting_canvas(rng, _canvas_size(DISTRACTING_SIZE, DISTRACTING_PAN, DISTRACTING_FRAMES))
    frames = np.empty((DISTRACTING_FRAMES, DISTRACTING_SIZE, DISTRACTING_SIZE, 3), np.uint8)
    backgrounds = _panned(rng, canvas, DISTRACTING_SIZE, DISTRACTING_PAN, DISTRACTING_FRAMES)
    for index, background in enumerate(backgrounds):
        pose = MOTIONS[motion](phases[index], reach, sign)
        disc, cover = _disc(pose, home, radius, size=DISTRACTING_SIZE, stripe=DISTRACTING_STRIPE)
        frames[index] = np.rint(background + cover[..., None] * (disc[..., None] - background))
    return frames


def classes_of(speeds: tuple[str, ...]) -> tuple[str, ...]:
    """Every motion at each of these speeds."""
    return tuple(f"{motion}_{speed}" for motion in MOTIONS for speed in speeds)


SCENES = {
    "demo": Scene(classes_of(("slow", "fast")), render_alike),
    "alike": Scene(classes_of(tuple(PERIODS)), render_alike),
    "distracting": Scene(classes_of(tuple(PERIODS)), render_distracting),
}


def _disc(
    pose: Pose, home: NDArray[np.float64], radius: float, *, size: int, stripe: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Grey values (size, size) of the striped disc, and how far (0 to 1) it covers each pixel."""
    down, across = np.mgrid[:size, :size].astype(np.float64)
    down, across = down - home[1] - pose.down, across - home[0] - pose.across
    cos, sin = np.cos(pose.turn), np.sin(pose.turn)
    along = (across * cos + down * sin) / pose.wide
    beside = (down * cos - across * sin) / pose.tall
    stripes = np.clip(3 * np.sin(2 * np.pi * along / stripe), -1, 1)
    cover = np.clip((radius - np.hypot(along, beside)) * min(pose.wide, pose.tall) + 0.5, 0, 1)
    return 127.5 + 120 * stripes, cover


def _moving(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Whether the disc moves (N,): for a while in each half, beginning anywhere."""
    moving = np.zeros((2, DISTRACTING_FRAMES // 2), bool)
    for half in moving:
        begin = rng.integers(0, len(half) - MOVING_FRAMES, endpoint=True)
        half[begin : begin + MOVING_FRAMES] = True
    return moving.ravel()


def _distracting_canvas(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A coloured texture (size, size, 3) with discs, boxes and triangles in it."""
    colours = [_noise(rng, size, middle=middle, strength=60) for middle in rng.uniform(60, 195, size=3)]
    canvas = np.ascontiguousarray(np.stack(colours, axis=-1).clip(0, 255))
    for _ in range(NUM_SHAPES):
        across, down = rng.uniform(0, size, size=2)
        reach, turn, colour = rng.uniform(4, 9), rng.uniform(0, 2 * np.pi), rng.uniform(0, 255, size=3)
        corners = rng.choice((3, 4, 24))  # as many as a disc needs to look round
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        outline = np.stack([across + reach * np.cos(angles), down + reach * np.sin(angles)], axis=-1)
        cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], colour.tolist())
    return canvas


def _canvas_size(size: int, max_pan: float, num_frames: int) -> int:
    """Pixels of the background, so that a frame stays inside wherever it pans."""
    return size + 2 * int(np.ceil(max_pan * num_frames / 2)) + 2


def _noise(rng: np.random.Generator, size: int, *, middle: float, strength: float) -> NDArray[np.float32]:
    """Still noise (size, size) of several octaves."""
    canvas = np.full((size, size), middle, np.float32)
    for octave, grid in enumerate(NOISE_GRIDS):
        noise = rng.uniform(-strength, strength, size=(grid, grid)).astype(np.float32) / 2**octave
        canvas += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return canvas


def _panned(
    rng: np.random.Generator, canvas: NDArray[np.float32], size: int, max_pan: float, num_frames: int
) -> Iterator[NDArray[np.float64]]:
    """Yield the background of every frame (size, size, …): a window that pans steadily over the canvas."""
    speed, direction = rng.uniform(0, max_pan), rng.uniform(0, 2 * np.pi)
    for index in range(num_frames):
        shift = speed * (index - (num_frames - 1) / 2)
        middle = (len(canvas) - 1) / 2
        centre = (middle + shift * np.cos(direction), middle + shift * np.sin(direction))
        yield cv2.getRectSubPix(canvas, (size, size), centre).astype(np.float64)

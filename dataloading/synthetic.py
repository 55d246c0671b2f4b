"""A labelled set of short MP4 files in which only motion tells the classes apart.

Every video shows the same striped disc on panning grey noise; what differs is how the disc moves. With random
colours and shapes instance discrimination would learn those, and pre-training would teach nothing of motion.
The eight motions look the same in a mirror, so a mirrored view never contradicts its label.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

NUM_FRAMES = 72  # two windows of 32 frames and some: room for one clip from each half
SIZE = 56  # pixels; a crop of 48 leaves the tubelets room to move
FPS = 25
PERIODS = {"slow": 32.0, "fast": 13.0}  # frames: one turn a clip of 16 frames at stride 2, and about 2.5
PERIOD_SPREAD = (0.85, 1.18)  # the two periods stay apart, yet no video has exactly either
STRIPE = 8.0  # pixels from one black stripe to the next
NOISE_GRIDS = (6, 12, 24, 48)  # coarse to fine; every octave half as strong as the one before
MAX_PAN = 1.5  # pixels a frame; a steady camera's share of the flow, which motion boundaries cancel


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
CLASSES = tuple(f"{motion}_{speed}" for motion in MOTIONS for speed in PERIODS)
SPLITS = ("train", "test")


def write_synthetic(
    folder: Path, *, seed: int, train_per_class: int = 40, test_per_class: int = 20, processes: int = 2
) -> int:
    """Write `folder/{train,test}/CLASS/NUMBER.mp4` and return the number of videos.

    What a file shows depends on the seed, its split, its class and its number alone.
    """
    jobs = [
        (split, label, index)
        for split, per_class in zip(SPLITS, (train_per_class, test_per_class), strict=True)
        for label in range(len(CLASSES))
        for index in range(per_class)
    ]
    for split in SPLITS:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: the parent may hold threads of OpenCV, PyTorch or fsspec.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(partial(_write_one, folder, seed), jobs, chunksize=16):
            pass
    return len(jobs)


def render(label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one video of class `label`: uint8 (72, 56, 56), grey."""
    motion, speed = CLASSES[label].split("_")
    step = 2 * np.pi / (PERIODS[speed] * rng.uniform(*PERIOD_SPREAD))
    start, reach, sign = rng.uniform(0, 2 * np.pi), rng.uniform(8, 12), int(rng.choice((-1, 1)))
    radius, home = rng.uniform(9, 12), rng.uniform(22, 34, size=2)
    frames = np.empty((NUM_FRAMES, SIZE, SIZE), np.uint8)
    for index, background in enumerate(_panning_noise(rng)):
        pose = MOTIONS[motion](start + index * step, reach, sign)
        disc, cover = _disc(pose, home, radius)
        frames[index] = np.rint(background + cover * (disc - background))
    return frames


def _disc(pose: Pose, home: NDArray[np.float64], radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Grey values (SIZE, SIZE) of the striped disc, and how far (0 to 1) it covers each pixel."""
    down, across = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    down, across = down - home[1] - pose.down, across - home[0] - pose.across
    cos, sin = np.cos(pose.turn), np.sin(pose.turn)
    along = (across * cos + down * sin) / pose.wide
    beside = (down * cos - across * sin) / pose.tall
    stripes = np.clip(3 * np.sin(2 * np.pi * along / STRIPE), -1, 1)
    cover = np.clip((radius - np.hypot(along, beside)) * min(pose.wide, pose.tall) + 0.5, 0, 1)
    return 127.5 + 120 * stripes, cover


def _panning_noise(rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Yield the background of every frame (SIZE, SIZE): a window that pans steadily over still noise."""
    canvas_size = SIZE + 2 * int(np.ceil(MAX_PAN * NUM_FRAMES / 2)) + 2
    canvas = np.full((canvas_size, canvas_size), 127.5, np.float32)
    for octave, grid in enumerate(NOISE_GRIDS):
        noise = rng.uniform(-40, 40, size=(grid, grid)).astype(np.float32) / 2**octave
        canvas += cv2.resize(noise, (canvas_size, canvas_size), interpolation=cv2.INTER_CUBIC)
    speed, direction = rng.uniform(0, MAX_PAN), rng.uniform(0, 2 * np.pi)
    for index in range(NUM_FRAMES):
        shift = speed * (index - (NUM_FRAMES - 1) / 2)
        middle = (canvas_size - 1) / 2
        centre = (middle + shift * np.cos(direction), middle + shift * np.sin(direction))
        yield cv2.getRectSubPix(canvas, (SIZE, SIZE), centre).astype(np.float64)


def _write_one(folder: Path, seed: int, job: tuple[str, int, int]) -> None:
    split, label, index = job
    rng = np.random.default_rng((seed, SPLITS.index(split), label, index))
    write_video(folder / split / CLASSES[label] / f"{index:04d}.mp4", render(label, rng))


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode grey frames (N, H, W), H and W even, as H.264 in MP4 at a quality that keeps fine stripes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        # One quantiser for all: x264's rate control looks ahead past the edge of frames that are not whole
        # macroblocks, so its bytes would differ from run to run. One thread: one process a core is faster.
        stream.options = {"qp": "14", "preset": "veryfast", "threads": "1"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(stream.encode())

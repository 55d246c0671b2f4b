"""Writes labelled sets of short MP4 files of synthetic scenes."""

import multiprocessing
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from dataloading.synthetic.scenes import SCENES

FPS = 25
SPLITS = ("train", "test")


def write_synthetic(
    folder: Path,
    *,
    seed: int,
    scene: str = "demo",
    train_per_class: int = 40,
    test_per_class: int = 20,
    processes: int = 2,
) -> int:
    """Write `folder/{train,test}/CLASS/NUMBER.mp4` of a scene of `SCENES`; returns the number of videos.

    The content of a file depends only on the scene, the seed, its split, its class and its number.
    """
    classes = SCENES[scene].classes
    jobs = [
        (split, label, index)
        for split, per_class in zip(SPLITS, (train_per_class, test_per_class), strict=True)
        for label in range(len(classes))
        for index in range(per_class)
    ]
    for split in SPLITS:
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: the parent may have threads of OpenCV, PyTorch or fsspec.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(partial(_write_one, folder, seed, scene), jobs, chunksize=16):
            pass
    return len(jobs)


def _write_one(folder: Path, seed: int, scene: str, job: tuple[str, int, int]) -> None:
    split, label, index = job
    name = SCENES[scene].classes[label]
    rng = np.random.default_rng((seed, SPLITS.index(split), label, index))
    write_video(folder / split / name / f"{index:04d}.mp4", SCENES[scene].render(name, rng))


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encode frames, grey (N, H, W) or RGB (N, H, W, 3), H and W even, as H.264 in MP4; fine stripes stay visible."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # A constant quantiser: x264's rate control reads past the edge of frames that are not whole macroblocks, so
        # its bytes would differ from run to run. One thread: one process per core is faster.
        stream.options = {"qp": "14", "preset": "veryfast", "threads": "1"}
        for image in frames:
            pixels = "gray" if image.ndim == 2 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=pixels)))
        container.mux(stream.encode())

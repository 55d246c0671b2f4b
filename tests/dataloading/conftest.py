"""A small shard set that is written without video files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.shards.format import Manifest, Sample, ShardEntry, ShardWriter, index_name, sha256

WriteSet = Callable[..., Path]


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """`write_set(lengths, window=8, per_shard=4, size=(40, 56), flow_size=(20, 28))` → the set's folder.

    Both components of a flow still show its frame in grey, so that pixels and flow can be compared.
    """

    def write(
        lengths: Sequence[int],
        *,
        window: int = 8,
        per_shard: int = 4,
        size: tuple[int, int] = (40, 56),
        flow_size: tuple[int, int] = (20, 28),
    ) -> Path:
        folder = tmp_path / "set"
        folder.mkdir()
        entries = []
        for first in range(0, len(lengths), per_shard):
            videos = range(first, min(first + per_shard, len(lengths)))
            samples = [_sample(video, lengths[video], window, size, flow_size) for video in videos]
            entries.append(_write_shard(folder, len(entries), samples))
        manifest = Manifest({"window": window}, ("only",), tuple(entries), ())
        (folder / "manifest.json").write_bytes(manifest.to_json())
        return folder

    return write


def _sample(seed: int, num_frames: int, window: int, size: tuple[int, int], flow_size: tuple[int, int]) -> Sample:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (5, 7), dtype=np.uint8) for _ in range(num_frames)]
    sides = dict(zip(("height", "width", "flow_height", "flow_width"), (*size, *flow_size), strict=True))
    flow = [np.tile(_resize(image, flow_size), (2, 1)) for image in images]
    return Sample(
        key=f"video-{seed}",
        info={"label": 0, "frames": num_frames, **sides},
        frames=[_jpeg(np.repeat(_resize(image, size)[..., None], 3, axis=2)) for image in images],
        flow=[_jpeg(both) for both in flow],
        motion=rng.integers(0, 256, (num_frames, 7, 7), dtype=np.uint8),
        scores=rng.random(max(num_frames - window + 1, 0), dtype=np.float32),
    )


def _write_shard(folder: Path, number: int, samples: Sequence[Sample]) -> ShardEntry:
    path = folder / f"shard-{number:06d}.tar"
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.add(sample)
    index = writer.index().to_bytes()
    (folder / index_name(path.name)).write_bytes(index)
    data = path.read_bytes()
    num_frames = sum(len(sample.frames) for sample in samples)
    return ShardEntry(path.name, len(samples), num_frames, len(data), sha256(data), sha256(index))


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def _jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

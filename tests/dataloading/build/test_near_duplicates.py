from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.build.builder import build_shards
from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.near_duplicates import MAX_DIFFERING, NUM_BYTES, VideoHash, dhash, near_duplicates
from dataloading.shards.format import NearDuplicate, read_complete_manifest
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import find_videos
from mcl_dist.storage.folder import Folder


def clip(seed: int, size: tuple[int, int] = (90, 120)) -> list[np.ndarray]:
    """Frames of blurred shapes, each different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 6, 8), dtype=np.uint8)
    return [cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC) for picture in coarse]


def stills(frames: Sequence[np.ndarray], quality: int = 90) -> list[bytes]:
    return [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes() for frame in frames]


def flip_bits(digest: bytes, bits: Sequence[int]) -> str:
    changed = bytearray(digest)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return changed.hex()


def test_a_copy_of_another_size_and_quality_is_found_and_other_videos_are_not() -> None:
    small = [cv2.resize(frame, (80, 60), interpolation=cv2.INTER_AREA) for frame in clip(0)]
    hashes = [VideoHash("original", dhash(stills(clip(0)))), VideoHash("copy", dhash(stills(small, quality=60)))]
    hashes += [VideoHash(f"other {seed}", dhash(stills(clip(seed)))) for seed in range(1, 20)]
    (found,) = near_duplicates(hashes)
    assert (found.source, found.like) == ("copy", "original")


def test_every_pair_within_the_limit_is_found_wherever_the_bits_differ() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        digest = rng.bytes(NUM_BYTES)
        bits = rng.choice(8 * NUM_BYTES, MAX_DIFFERING, replace=False).tolist()
        near, far = VideoHash("near", flip_bits(digest, bits)), VideoHash("far", flip_bits(rng.bytes(NUM_BYTES), []))
        assert near_duplicates([VideoHash("first", digest.hex()), far, near]) == (
            NearDuplicate("near", "first", MAX_DIFFERING),
        )


def test_every_copy_names_the_earliest_similar_video() -> None:
    digest = bytes(range(NUM_BYTES))
    hashes = [VideoHash(name, flip_bits(digest, bits)) for name, bits in (("a", [0]), ("b", [1]), ("c", []))]
    assert near_duplicates(hashes) == (NearDuplicate("b", "a", 2), NearDuplicate("c", "a", 1))


@pytest.mark.parametrize("hashes", [[], [VideoHash("alone", "00" * NUM_BYTES)]])
def test_one_video_or_none_has_no_near_duplicate(hashes: list[VideoHash]) -> None:
    assert near_duplicates(hashes) == ()


@pytest.mark.slow
def test_a_resumed_build_lists_near_duplicates_across_the_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataloading.build.builder.MEGABYTE", 1)
    (tmp_path / "source" / "a").mkdir(parents=True)
    for name, seed, size in (("one", 0, (90, 120)), ("copy", 0, (60, 80)), ("other", 1, (90, 120))):
        write_video(tmp_path / "source" / "a" / f"{name}.mp4", np.array(clip(seed, size)))
    sources, config = find_videos(str(tmp_path / "source")), BuildConfig("dis", short_side=0, window=4)
    whole, resumed = (Folder(str(tmp_path / name)) for name in ("whole", "resumed"))
    manifest = build_shards(sources, whole, config, LocalExecutor(1), lambda _: None)
    (found,) = manifest.near_duplicates
    assert {found.source, found.like} == {"a/one.mp4", "a/copy.mp4"}
    results = []

    def stop(result: object) -> None:
        results.append(result)
        if len(results) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(sources, resumed, config, LocalExecutor(1), stop)
    assert build_shards(sources, resumed, config, LocalExecutor(1), lambda _: None) == manifest
    assert read_complete_manifest(resumed) == manifest

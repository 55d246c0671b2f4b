from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.build.builder import build_shards
from dataloading.build.local_executor import LocalExecutor
from dataloading.build.near_duplicates import MAX_DIFFERING, NUM_BYTES, VideoHash, dhash, near_duplicates
from dataloading.build.video_processor import BuildConfig
from dataloading.shards.format import NearDuplicate, read_manifest
from dataloading.synthetic.videos import write_video
from dataloading.videos.sources import scan_sources
from mcl_dist.storage.folder import Folder


def film(seed: int, size: tuple[int, int] = (90, 120)) -> list[np.ndarray]:
    """Soft shapes that change from frame to frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 6, 8), dtype=np.uint8)
    return [cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC) for picture in coarse]


def stills(frames: Sequence[np.ndarray], quality: int = 90) -> list[bytes]:
    return [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes() for frame in frames]


def flipped(look: bytes, bits: Sequence[int]) -> str:
    changed = bytearray(look)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return changed.hex()


def test_a_copy_of_another_size_and_quality_looks_alike_and_other_films_do_not() -> None:
    small = [cv2.resize(frame, (80, 60), interpolation=cv2.INTER_AREA) for frame in film(0)]
    looks = [VideoHash("original", dhash(stills(film(0)))), VideoHash("copy", dhash(stills(small, quality=60)))]
    looks += [VideoHash(f"other {seed}", dhash(stills(film(seed)))) for seed in range(1, 20)]
    (found,) = near_duplicates(looks)
    assert (found.source, found.like) == ("copy", "original")


def test_no_pair_within_the_limit_is_overlooked_wherever_the_bits_differ() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        look = rng.bytes(NUM_BYTES)
        bits = rng.choice(8 * NUM_BYTES, MAX_DIFFERING, replace=False).tolist()
        near, far = VideoHash("near", flipped(look, bits)), VideoHash("far", flipped(rng.bytes(NUM_BYTES), []))
        assert near_duplicates([VideoHash("first", look.hex()), far, near]) == (
            NearDuplicate("near", "first", MAX_DIFFERING),
        )


def test_every_copy_names_the_earliest_it_looks_like() -> None:
    look = bytes(range(NUM_BYTES))
    looks = [VideoHash(name, flipped(look, bits)) for name, bits in (("a", [0]), ("b", [1]), ("c", []))]
    assert near_duplicates(looks) == (NearDuplicate("b", "a", 2), NearDuplicate("c", "a", 1))


@pytest.mark.parametrize("looks", [[], [VideoHash("alone", "00" * NUM_BYTES)]])
def test_of_one_video_or_none_nothing_looks_alike(looks: list[VideoHash]) -> None:
    assert near_duplicates(looks) == ()


def test_a_build_lists_them_also_when_it_was_interrupted_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataloading.build.builder.MEGABYTE", 1)
    (tmp_path / "source" / "a").mkdir(parents=True)
    for name, seed, size in (("one", 0, (90, 120)), ("copy", 0, (60, 80)), ("other", 1, (90, 120))):
        write_video(tmp_path / "source" / "a" / f"{name}.mp4", np.array(film(seed, size)))
    sources, config = scan_sources(str(tmp_path / "source")), BuildConfig("dis", short_side=0, window=4)
    whole, resumed = (Folder(str(tmp_path / name)) for name in ("whole", "resumed"))
    manifest = build_shards(sources, whole, config, LocalExecutor(1), lambda _: None)
    (found,) = manifest.near_duplicates
    assert {found.source, found.like} == {"a/one.mp4", "a/copy.mp4"}
    told = []

    def stop(outcome: object) -> None:
        told.append(outcome)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(sources, resumed, config, LocalExecutor(1), stop)
    assert (
        build_shards(sources, resumed, config, LocalExecutor(1), lambda _: None) == manifest == read_manifest(resumed)
    )

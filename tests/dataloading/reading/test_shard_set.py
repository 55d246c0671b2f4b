from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from dataloading.reading.fetcher import FetchConfig
from dataloading.reading.shard_set import ShardSet
from dataloading.shards.bad_sample import BadSampleError
from dataloading.shards.format import Manifest
from dataloading.shards.index import ShardIndex
from mcl_dist.errors import ConfigError, UserError
from tests.support.shard_sets import reseal

WriteSet = Callable[..., Path]
LENGTHS = [9, 12, 8, 20, 10]


@pytest.fixture
def folder(write_set: WriteSet) -> Path:
    return write_set(LENGTHS, per_shard=2)


def overwrite(folder: Path, shard: str, place: tuple[int, int], data: bytes) -> None:
    """Write over the beginning of (offset, size) of a shard, leaving its length."""
    with (folder / shard).open("r+b") as file:
        file.seek(place[0])
        file.write(data)


def still_place(folder: Path, shard: int, sample: int, kind: str, still: int) -> tuple[int, int]:
    shards = ShardSet(str(folder))
    index: ShardIndex = shards._indices[shard]
    offset, size = index.stills(sample, kind)[still].tolist()  # type: ignore[arg-type]
    return offset, size


def remote(folder: Path, name: str) -> str:
    """A copy of the set that is not on this machine, as far as fsspec knows."""
    url = f"memory://{name}"
    fsspec.filesystem("memory").put(str(folder), f"/{name}", recursive=True)
    return url


def test_videos_are_found_by_their_position_in_the_set(folder: Path) -> None:
    shards = ShardSet(str(folder))

    assert len(shards) == 5
    assert shards.keys.tolist() == [f"video-{number}" for number in range(5)]
    for position, num_frames in enumerate(LENGTHS):
        video = shards.read(position)
        assert video.num_frames == shards.num_frames[position] == num_frames
        assert video.frame_maps.shape == (num_frames, 7, 7)
        assert video.clip_scores.shape == (num_frames - 7,)
        assert video.where.endswith(f"shard-{position // 2:06d}.tar, video video-{position}")


def test_stills_are_those_of_the_member(folder: Path) -> None:
    video = ShardSet(str(folder)).read(3)

    frames, flow = video.frames([5, 2, 2]), video.flow([5])

    assert np.array_equal(frames[1], frames[2])
    frame, both = (cv2.imdecode(still, cv2.IMREAD_GRAYSCALE) for still in (frames[0], flow[0]))
    assert (frame.shape, both.shape) == ((40, 56), (40, 28))
    small = cv2.resize(frame, (28, 20), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(small - both[:20]).mean() < 5
    assert np.abs(small - both[20:]).mean() < 5


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (b"not a JPEG", "is not a whole JPEG"),
        (cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()[:-2], "is 8x8 pixels, must be 56x40"),
    ],
)
def test_a_still_that_is_no_such_jpeg_is_named(folder: Path, damage: bytes, found: str) -> None:
    offset, size = still_place(folder, shard=1, sample=1, kind="frames", still=4)
    overwrite(folder, "shard-000001.tar", (offset, size), damage[:size])
    reseal(folder)
    video = ShardSet(str(folder)).read(3)

    with pytest.raises(BadSampleError) as raised:
        video.frames([3, 4])

    message = str(raised.value)
    assert f"shard-000001.tar, video video-3: frames still 4 {found}" in message
    assert message.endswith(f"run `mcl shards verify {folder}`")


def test_a_still_without_its_end_is_named(folder: Path) -> None:
    offset, size = still_place(folder, shard=0, sample=0, kind="flow", still=1)
    overwrite(folder, "shard-000000.tar", (offset + size - 2, 2), b"\0\0")
    reseal(folder)

    with pytest.raises(UserError, match="video video-0: flow still 1 is not a whole JPEG"):
        ShardSet(str(folder)).read(0).flow([1])


def test_maps_that_are_no_array_are_named(folder: Path) -> None:
    shards = ShardSet(str(folder))
    overwrite(folder, "shard-000000.tar", tuple(shards._indices[0].members[1, 3]), b"rubbish")
    reseal(folder)

    with pytest.raises(
        BadSampleError, match=r"video video-1: its maps or scores are no NumPy arrays; run `mcl sh"
    ) as bad:
        ShardSet(str(folder)).read(1)
    assert (bad.value.shard, bad.value.key, bad.value.reason) == (f"{folder}/shard-000000.tar", "video-1", "maps")


def test_a_shard_that_vanished_is_named(folder: Path) -> None:
    shards = ShardSet(str(folder))
    (folder / "shard-000002.tar").unlink()

    with pytest.raises(UserError, match=r"shard-000002\.tar, video video-4: its shard cannot be read \(No such file"):
        shards.read(4)


def test_a_remote_shard_is_fetched_once_when_it_is_needed(folder: Path, tmp_path: Path) -> None:
    url, cache = remote(folder, "fetched"), tmp_path / "cache"
    shards = ShardSet(url, str(cache))
    assert not list(cache.glob("*.tar"))
    expected = ShardSet(str(folder)).read(2).frames([1])[0]

    first = shards.read(2).frames([1])[0]
    fsspec.filesystem("memory").rm("/fetched/shard-000001.tar")
    second = shards.read(2).frames([1])[0]

    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)
    digest = hashlib.sha256((folder / "shard-000001.tar").read_bytes()).hexdigest()
    assert [path.name for path in cache.glob("*.tar")] == [f"{digest}.tar"]


@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_of_a_shard_that_is_damaged_where_it_lies_the_other_samples_stay_usable(
    folder: Path, tmp_path: Path, fetch: str
) -> None:
    expected = ShardSet(str(folder)).read(1).frames([2])[0]
    overwrite(folder, "shard-000000.tar", still_place(folder, 0, 0, "frames", 3), b"\0\0\0")
    shards = ShardSet(remote(folder, f"damaged-{fetch}"), str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    assert np.array_equal(shards.read(1).frames([2])[0], expected)
    video = shards.read(0)
    assert len(video.frames([0, 1, 2])) == 3
    with pytest.raises(BadSampleError, match=r"video video-0: frames still 3 is not what was stored; run") as bad:
        video.frames([2, 3])
    assert bad.value.reason == "checksum"
    assert shards.counters()["retries"]["wrong_digest"] == 1


@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_of_a_shard_that_was_cut_the_samples_before_the_cut_stay_usable(
    folder: Path, tmp_path: Path, fetch: str
) -> None:
    place = still_place(folder, 0, 1, "frames", 3)[0]
    url = remote(folder, f"cut-{fetch}")
    path = f"/cut-{fetch}/shard-000000.tar"
    fsspec.filesystem("memory").pipe(path, (folder / "shard-000000.tar").read_bytes()[:place])
    shards = ShardSet(url, str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    assert len(shards.read(0).frames(range(9))) == 9
    with pytest.raises(BadSampleError, match=r"video video-1: motion\.npy is beyond the end of the shard") as bad:
        shards.read(1)
    assert bad.value.reason == "missing"


@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_a_shard_that_is_not_there_is_a_sample_that_is_missing(folder: Path, tmp_path: Path, fetch: str) -> None:
    url = remote(folder, f"gone-{fetch}")
    fsspec.filesystem("memory").rm(f"/gone-{fetch}/shard-000000.tar")
    shards = ShardSet(url, str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    with pytest.raises(BadSampleError, match="video video-1: its shard cannot be read") as bad:
        shards.read(1)
    assert bad.value.reason == "missing"
    assert len(shards.read(2).flow([0])) == 1


def test_a_copy_that_went_bad_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet(remote(folder, "rotten"), str(tmp_path / "cache"))
    before = shards.read(0).frames([4])[0]
    (copy,) = (tmp_path / "cache").glob("*.tar")
    place = still_place(folder, 0, 0, "frames", 4)
    overwrite(copy.parent, copy.name, place, b"\0" * 9)

    assert np.array_equal(shards.read(0).frames([4])[0], before)
    counters = shards.counters()
    assert (counters["cache_repairs"], counters["cache_misses"]) == (1, 2)


def test_a_remote_set_needs_a_cache(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: missing; memory://elsewhere is not on this machine"):
        ShardSet(remote(folder, "elsewhere"))


def test_a_set_of_no_videos_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(Manifest({}, (), (), ()).to_json())
    with pytest.raises(UserError, match="holds no video"):
        ShardSet(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "found"), [(b"\xff\xff", "its json cannot be read"), (b"[]", "its json is no object")]
)
def test_a_json_that_is_none_is_named(folder: Path, damage: bytes, found: str) -> None:
    shards = ShardSet(str(folder))
    offset, size = shards._indices[0].members[0, 0]
    overwrite(folder, "shard-000000.tar", (offset, size), damage.ljust(size))
    reseal(folder)

    with pytest.raises(BadSampleError, match=f"video video-0: {found}"):
        ShardSet(str(folder)).read(0).info()

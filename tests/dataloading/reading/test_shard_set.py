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
from dataloading.shards.format import Manifest, read_index, read_manifest
from dataloading.shards.index import ShardIndex
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder
from tests.support.shard_sets import update_digests

WriteSet = Callable[..., Path]
LENGTHS = [9, 12, 8, 20, 10]


@pytest.fixture
def folder(write_set: WriteSet) -> Path:
    return write_set(LENGTHS, per_shard=2)


def overwrite(folder: Path, shard: str, extent: tuple[int, int], data: bytes) -> None:
    """Overwrite the start of an (offset, size) of a shard; its length is unchanged."""
    with (folder / shard).open("r+b") as file:
        file.seek(extent[0])
        file.write(data)


def index_of(folder: Path, shard: int) -> ShardIndex:
    store = Folder(str(folder))
    return read_index(store, read_manifest(store).shards[shard])


def still_extent(folder: Path, shard: int, sample: int, kind: str, still: int) -> tuple[int, int]:
    offset, size = index_of(folder, shard).stills(sample, kind)[still].tolist()  # type: ignore[arg-type]
    return offset, size


def remote(folder: Path, name: str) -> str:
    """A copy of the set that is remote for fsspec."""
    url = f"memory://{name}"
    fsspec.filesystem("memory").put(str(folder), f"/{name}", recursive=True)
    return url


def test_a_position_in_the_set_leads_to_its_video(folder: Path) -> None:
    shards = ShardSet(str(folder))

    assert len(shards) == 5
    assert shards.keys.tolist() == [f"video-{number}" for number in range(5)]
    for position, num_frames in enumerate(LENGTHS):
        video = shards.read(position)
        assert video.num_frames == shards.num_frames[position] == num_frames
        assert video.frame_maps.shape == (num_frames, 7, 7)
        assert video.clip_scores.shape == (num_frames - 7,)
        assert video.where.endswith(f"shard-{position // 2:06d}.tar, video video-{position}")


def test_stills_are_those_of_the_requested_frames(folder: Path) -> None:
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
def test_a_still_that_is_no_jpeg_of_the_right_size_is_an_error_with_its_name(
    folder: Path, damage: bytes, found: str
) -> None:
    offset, size = still_extent(folder, shard=1, sample=1, kind="frames", still=4)
    overwrite(folder, "shard-000001.tar", (offset, size), damage[:size])
    update_digests(folder)
    video = ShardSet(str(folder)).read(3)

    with pytest.raises(BadSampleError) as raised:
        video.frames([3, 4])

    message = str(raised.value)
    assert f"shard-000001.tar, video video-3: frames still 4 {found}" in message
    assert message.endswith(f"run `mcl shards verify {folder}`")


def test_a_truncated_still_is_an_error_with_its_name(folder: Path) -> None:
    offset, size = still_extent(folder, shard=0, sample=0, kind="flow", still=1)
    overwrite(folder, "shard-000000.tar", (offset + size - 2, 2), b"\0\0")
    update_digests(folder)

    with pytest.raises(UserError, match="video video-0: flow still 1 is not a whole JPEG"):
        ShardSet(str(folder)).read(0).flow([1])


def test_maps_that_are_no_array_are_an_error_with_the_video(folder: Path) -> None:
    overwrite(folder, "shard-000000.tar", tuple(index_of(folder, 0).members[1, 3]), b"rubbish")
    update_digests(folder)

    with pytest.raises(
        BadSampleError, match=r"video video-1: its maps or scores are not NumPy arrays; run `mcl sh"
    ) as bad:
        ShardSet(str(folder)).read(1)
    assert (bad.value.shard, bad.value.key, bad.value.reason) == (f"{folder}/shard-000000.tar", "video-1", "maps")


def test_a_missing_local_shard_is_an_error_with_its_name(folder: Path) -> None:
    shards = ShardSet(str(folder))
    (folder / "shard-000002.tar").unlink()

    with pytest.raises(UserError, match=r"shard-000002\.tar, video video-4: its shard cannot be read \(No such file"):
        shards.read(4)


def test_a_remote_shard_is_fetched_once_on_first_use(folder: Path, tmp_path: Path) -> None:
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
def test_the_other_samples_of_a_shard_that_is_damaged_in_the_store_stay_usable(
    folder: Path, tmp_path: Path, fetch: str
) -> None:
    expected = ShardSet(str(folder)).read(1).frames([2])[0]
    overwrite(folder, "shard-000000.tar", still_extent(folder, 0, 0, "frames", 3), b"\0\0\0")
    shards = ShardSet(remote(folder, f"damaged-{fetch}"), str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    assert np.array_equal(shards.read(1).frames([2])[0], expected)
    video = shards.read(0)
    assert len(video.frames([0, 1, 2])) == 3
    with pytest.raises(BadSampleError, match=r"video video-0: frames still 3 does not match its checksum; run") as bad:
        video.frames([2, 3])
    assert bad.value.reason == "checksum"
    assert shards.counters()["retries"]["wrong_digest"] == 1


@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_the_samples_before_the_end_of_a_truncated_shard_stay_usable(folder: Path, tmp_path: Path, fetch: str) -> None:
    end = still_extent(folder, 0, 1, "frames", 3)[0]
    url = remote(folder, f"cut-{fetch}")
    path = f"/cut-{fetch}/shard-000000.tar"
    fsspec.filesystem("memory").pipe(path, (folder / "shard-000000.tar").read_bytes()[:end])
    shards = ShardSet(url, str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    assert len(shards.read(0).frames(range(9))) == 9
    with pytest.raises(BadSampleError, match=r"video video-1: motion\.npy is beyond the end of the shard") as bad:
        shards.read(1)
    assert bad.value.reason == "missing"


@pytest.mark.parametrize("fetch", ["whole", "ranges"])
def test_a_sample_of_a_missing_remote_shard_is_missing(folder: Path, tmp_path: Path, fetch: str) -> None:
    url = remote(folder, f"gone-{fetch}")
    fsspec.filesystem("memory").rm(f"/gone-{fetch}/shard-000000.tar")
    shards = ShardSet(url, str(tmp_path / "cache"), FetchConfig(fetch=fetch))

    with pytest.raises(BadSampleError, match="video video-1: its shard cannot be read") as bad:
        shards.read(1)
    assert bad.value.reason == "missing"
    assert len(shards.read(2).flow([0])) == 1


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet(remote(folder, "rotten"), str(tmp_path / "cache"))
    before = shards.read(0).frames([4])[0]
    (copy,) = (tmp_path / "cache").glob("*.tar")
    overwrite(copy.parent, copy.name, still_extent(folder, 0, 0, "frames", 4), b"\0" * 9)

    assert np.array_equal(shards.read(0).frames([4])[0], before)
    counters = shards.counters()
    assert (counters["cache_repairs"], counters["cache_misses"]) == (1, 2)


def test_a_remote_set_needs_a_cache(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: missing; memory://elsewhere is not on this machine"):
        ShardSet(remote(folder, "elsewhere"))


def test_a_set_without_videos_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(Manifest({}, (), (), ()).to_json())
    with pytest.raises(UserError, match="holds no video"):
        ShardSet(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "found"), [(b"\xff\xff", "its json cannot be read"), (b"[]", "its json is no object")]
)
def test_an_invalid_json_is_an_error_with_the_video(folder: Path, damage: bytes, found: str) -> None:
    offset, size = index_of(folder, 0).members[0, 0]
    overwrite(folder, "shard-000000.tar", (offset, size), damage.ljust(size))
    update_digests(folder)

    with pytest.raises(BadSampleError, match=f"video video-0: {found}"):
        ShardSet(str(folder)).read(0).info()

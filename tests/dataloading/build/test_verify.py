from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataloading.build.verify import verify_shards
from dataloading.shards.format import read_index, read_manifest
from dataloading.shards.headers import jpeg_size
from dataloading.shards.index import MEMBERS
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

SHARD = "shard-000000.tar"


@pytest.fixture
def folder(write_set: Callable[..., Path]) -> Folder:
    return Folder(str(write_set([9, 12, 10], per_shard=2)))


def place(folder: Folder, member: str) -> int:
    """Offset of the byte in the middle of a member of the first sample."""
    index = read_index(folder, read_manifest(folder).shards[0])
    offset, size = index.members[0, MEMBERS.index(member)]
    return int(offset + size // 2)


def flip(folder: Folder, name: str, offset: int) -> None:
    data = bytearray(folder.read(name))
    data[offset] ^= 0xFF
    folder.write(name, bytes(data))


def problems(folder: Folder) -> str:
    return "\n".join(verify_shards(folder).problems)


def test_an_intact_set_has_no_problem(folder: Folder) -> None:
    result = verify_shards(folder)
    assert (result.videos, result.shards, result.problems) == (3, 2, ())
    assert result.bytes == folder.size(SHARD) + folder.size("shard-000001.tar")


@pytest.mark.slow
def test_many_processes_find_the_same_problems_as_one(folder: Folder) -> None:
    flip(folder, SHARD, place(folder, "flow.mjpg"))
    flip(folder, "shard-000001.index.npz", 200)
    expected = verify_shards(folder)
    assert len(expected.problems) > 2
    assert verify_shards(folder, workers=2) == expected


@pytest.mark.parametrize("member", MEMBERS[1:])
def test_a_flipped_byte_of_a_member_is_found_and_named(folder: Folder, member: str) -> None:
    flip(folder, SHARD, place(folder, member))
    assert f"{SHARD}: its sha256 is not that of the manifest" in problems(folder)
    assert f"video-0: the sha256 of {member} is not the one in its json" in problems(folder)


def test_a_damaged_tar_header_is_found(folder: Folder) -> None:
    flip(folder, SHARD, 3)
    assert "is in the index, not in the tar" in problems(folder) or "not a readable tar" in problems(folder)


def test_a_damaged_index_is_found(folder: Folder) -> None:
    flip(folder, "shard-000001.index.npz", 200)
    assert "shard-000001.index.npz: its digest differs from the manifest's" in problems(folder)


def test_a_shortened_shard_is_found(folder: Folder) -> None:
    folder.write(SHARD, folder.read(SHARD)[:-5000])
    assert re.search(rf"{SHARD}: \d+ bytes, \d+ in the manifest; rebuild the set", problems(folder))


def test_a_missing_shard_is_found(folder: Folder) -> None:
    folder.remove(SHARD)
    assert f"{SHARD}: no such file" in problems(folder)


def test_a_file_that_the_manifest_does_not_name_is_found(folder: Folder) -> None:
    folder.write("shard-000007.tar", b"leftover")
    assert "shard-000007.tar: the manifest does not name it" in problems(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing, so this is no complete shard set"):
        verify_shards(Folder(str(tmp_path)))


@pytest.mark.parametrize("shape", [(17, 30), (31, 9, 3)])
def test_a_jpegs_size_is_read_from_its_header(shape: tuple[int, ...]) -> None:
    still = cv2.imencode(".jpg", np.zeros(shape, np.uint8))[1].tobytes()
    assert jpeg_size(still) == shape[:2]
    assert jpeg_size(b"\xff\xd8 no header \xff\xd9") is None

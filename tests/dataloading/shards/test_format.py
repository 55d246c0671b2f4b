from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dataloading.shards.format import (
    MANIFEST,
    Manifest,
    RefusedVideo,
    Sample,
    ShardEntry,
    ShardWriter,
    add_digest,
    index_name,
    parse_manifest,
    read_complete_manifest,
    read_index,
)
from dataloading.shards.index import MEMBERS
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

SHARD = "shard-000000.tar"


def sample(key: str, num_frames: int, seed: int) -> Sample:
    generator = np.random.default_rng(seed)
    stills = [
        [b"\xff\xd8" + generator.bytes(int(size)) + b"\xff\xd9" for size in generator.integers(5, 900, num_frames)]
        for _ in range(2)
    ]
    info = {"label": seed, "frames": num_frames, "height": 8, "width": 10, "flow_height": 4, "flow_width": 5}
    motion = generator.integers(0, 256, (num_frames, 7, 7), dtype=np.uint8)
    return Sample(key, info, stills[0], stills[1], motion, generator.random(num_frames, dtype=np.float32))


SAMPLES = [sample("first", 3, 0), sample("second-one", 5, 1)]


def write_set(root: Path) -> Manifest:
    root.mkdir(exist_ok=True)
    with ShardWriter(root / SHARD) as writer:
        for item in SAMPLES:
            writer.add(item)
    index = writer.index().to_bytes()
    (root / index_name(SHARD)).write_bytes(index)
    data = (root / SHARD).read_bytes()
    digests = [hashlib.sha256(part).hexdigest() for part in (data, index)]
    entry = ShardEntry(SHARD, len(SAMPLES), 8, len(data), *digests)
    manifest = Manifest({"seed": 0}, ("a", "b"), (entry,), (RefusedVideo("a/x.mp4", "truncated"),))
    (root / MANIFEST).write_bytes(manifest.to_json())
    return manifest


@pytest.fixture
def written(tmp_path: Path) -> tuple[Folder, Manifest]:
    return Folder(str(tmp_path / "set")), write_set(tmp_path / "set")


def change(folder: Folder, **values: Any) -> None:
    tree = json.loads(folder.read(MANIFEST)) | values
    folder.write(MANIFEST, add_digest(tree))


# webdataset does not close its file
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_every_sample_with_all_members(written: tuple[Folder, Manifest]) -> None:
    shard = written[0].path(SHARD)
    found = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [item["__key__"] for item in found] == ["first", "second-one"]
    for item, expected in zip(found, SAMPLES, strict=True):
        assert {name: item[name] for name in MEMBERS} == expected.members()


def test_members_are_in_the_documented_order(written: tuple[Folder, Manifest]) -> None:
    with tarfile.open(written[0].path(SHARD)) as tar:
        assert tar.getnames() == [f"{item.key}.{member}" for item in SAMPLES for member in MEMBERS]


def test_the_index_locates_every_member_and_every_still(written: tuple[Folder, Manifest]) -> None:
    folder, manifest = written
    data = folder.read(SHARD)
    index = read_index(folder, manifest.shards[0])
    for position, expected in enumerate(SAMPLES):
        members = [data[offset : offset + size] for offset, size in index.members[position]]
        assert members == list(expected.members().values())
        frames = [data[offset : offset + size] for offset, size in index.stills(position, "frames")]
        flow = [data[offset : offset + size] for offset, size in index.stills(position, "flow")]
        assert (frames, flow) == (expected.frames, expected.flow)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write_set(tmp_path / "one") == write_set(tmp_path / "two")


def test_a_manifest_survives_the_round_trip(written: tuple[Folder, Manifest]) -> None:
    folder, manifest = written
    assert read_complete_manifest(folder) == manifest
    assert (manifest.num_videos, manifest.num_frames) == (2, 8)


def test_a_folder_without_a_manifest_is_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: missing.*mcl shards build"):
        read_complete_manifest(Folder(str(tmp_path)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "other"}, "format 'other' version 1"),
        ({"version": 2}, "version 2"),
        ({"shards": [{"name": SHARD}]}, "damaged"),
        ({"totals": {}}, "totals"),
    ],
)
def test_a_foreign_manifest_is_rejected(written: tuple[Folder, Manifest], values: dict[str, Any], message: str) -> None:
    change(written[0], **values)
    with pytest.raises(UserError, match=message):
        read_complete_manifest(written[0])


def test_a_manifest_that_lists_a_file_outside_its_folder_is_rejected(written: tuple[Folder, Manifest]) -> None:
    folder, _ = written
    shards = json.loads(folder.read(MANIFEST))["shards"]
    change(folder, shards=[shards[0] | {"name": "../secret.tar"}])
    with pytest.raises(UserError, match="is not a shard's name"):
        read_complete_manifest(folder)


def test_a_shard_of_another_size_is_rejected(written: tuple[Folder, Manifest]) -> None:
    folder, _ = written
    folder.write(SHARD, folder.read(SHARD)[:-512])
    with pytest.raises(UserError, match=r"shard-000000\.tar: \d+ bytes, \d+ in the manifest"):
        read_complete_manifest(folder)


def test_a_missing_shard_is_rejected(written: tuple[Folder, Manifest]) -> None:
    folder, _ = written
    folder.remove(SHARD)
    with pytest.raises(UserError, match=r"shard-000000\.tar: missing"):
        read_complete_manifest(folder)


def test_a_changed_index_is_rejected(written: tuple[Folder, Manifest]) -> None:
    folder, manifest = written
    folder.write(index_name(SHARD), folder.read(index_name(SHARD)) + b"x")
    with pytest.raises(UserError, match="its digest differs from the manifest's"):
        read_index(folder, manifest.shards[0])


def test_an_index_without_checksums_is_rejected_with_a_remedy(written: tuple[Folder, Manifest]) -> None:
    folder, manifest = written
    old = {name: array for name, array in vars(read_index(folder, manifest.shards[0])).items() if "crc" not in name}
    buffer = io.BytesIO()
    np.savez(buffer, **old)
    entry = replace(manifest.shards[0], index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    folder.write(index_name(SHARD), buffer.getvalue())
    with pytest.raises(
        UserError, match=r"has no member_crcs; sets of an earlier version have no checksums; rebuild the set"
    ):
        read_index(folder, entry)


def test_a_manifest_with_any_changed_byte_is_rejected(written: tuple[Folder, Manifest]) -> None:
    folder, _ = written
    data = folder.read(MANIFEST)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 4
        with pytest.raises(UserError, match=r"manifest\.json: (not JSON|format|damaged).*rebuild the set"):
            parse_manifest(bytes(changed), "manifest.json")

"""Checks every byte of a shard set against its manifest, its indices and its digests."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataloading.build.local_executor import ordered_map
from dataloading.motion import MAP_CELLS
from dataloading.shards.format import (
    MANIFEST,
    REPORT,
    Manifest,
    ShardEntry,
    index_name,
    read_index,
    read_manifest,
    sha256,
)
from dataloading.shards.headers import JPEG_END, JPEG_START, from_npy, jpeg_size
from dataloading.shards.index import MEMBERS, ShardIndex, StillKind
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder


@dataclass(frozen=True)
class Verification:
    """Totals of the manifest, and one line for each problem."""

    videos: int
    shards: int
    bytes: int
    problems: tuple[str, ...]


def verify_shards(folder: Folder, workers: int = 1) -> Verification:
    """Read the whole set in `workers` processes and collect its problems; each process holds one shard in memory.

    Raises:
        UserError: the manifest is missing or unreadable.
    """
    manifest = read_manifest(folder)
    check = _ShardCheck(folder.url, len(manifest.classes))
    with ordered_map(check, manifest.shards, max(1, min(workers, len(manifest.shards)))) as found:
        problems = [problem for of_shard in found for problem in of_shard]
    problems += _stray_problems(folder, manifest)
    return Verification(manifest.num_videos, len(manifest.shards), manifest.num_bytes, tuple(problems))


@dataclass(frozen=True)
class _ShardCheck:
    """Collects the problems of one shard; runs in a worker process."""

    url: str
    num_classes: int

    def __call__(self, entry: ShardEntry) -> list[str]:
        return list(_shard_problems(Folder(self.url), entry, self.num_classes))


def _stray_problems(folder: Folder, manifest: Manifest) -> Iterator[str]:
    named = {MANIFEST, REPORT}
    for entry in manifest.shards:
        named |= {entry.name, index_name(entry.name)}
    for name in folder.names():
        if name not in named:
            yield f"{folder.url}/{name}: the manifest does not name it; remove it"


def _shard_problems(folder: Folder, entry: ShardEntry, num_classes: int) -> Iterator[str]:
    where = f"{folder.url}/{entry.name}"
    try:
        data = folder.read(entry.name)
        index = read_index(folder, entry)
    except UserError as error:
        yield str(error)
        return
    if len(data) != entry.bytes:
        yield f"{where}: {len(data)} bytes, {entry.bytes} in the manifest; rebuild the set"
    elif sha256(data) != entry.sha256:
        yield f"{where}: its sha256 is not that of the manifest; rebuild the set"
    yield from (f"{where}: {problem}" for problem in _tar_problems(data, index))
    for sample, key in enumerate(index.keys):
        problems = _sample_problems(data, index, sample, num_classes)
        yield from (f"{where}: {key}: {problem}" for problem in problems)


def _tar_problems(data: bytes, index: ShardIndex) -> Iterator[str]:
    """Compare the headers of the tar with the index."""
    expected = {
        f"{key}.{member}": tuple(place)
        for key, places in zip(index.keys.tolist(), index.members.tolist(), strict=True)
        for member, place in zip(MEMBERS, places, strict=True)
    }
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar}
    except tarfile.TarError as error:
        yield f"not a readable tar ({error})"
        return
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is in the index, not in the tar"
        elif name not in expected:
            yield f"{name} is in the tar, not in the index"
        elif found[name] != expected[name]:
            yield f"{name} is at {found[name]} (offset, size), at {expected[name]} in the index"


def _sample_problems(data: bytes, index: ShardIndex, sample: int, num_classes: int) -> Iterator[str]:
    members = {
        name: data[offset : offset + size]
        for name, (offset, size) in zip(MEMBERS, index.members[sample].tolist(), strict=True)
    }
    for name, crc in zip(MEMBERS, index.member_crcs[sample].tolist(), strict=True):
        if zlib.crc32(members[name]) != crc:
            yield f"the checksum of {name} is not that of the index"
    try:
        yield from _info_problems(members, index, sample, num_classes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"its members are damaged ({type(error).__name__}: {error})"
    frame_size = (int(index.heights[sample]), int(index.widths[sample]))
    flow_size = (2 * int(index.flow_heights[sample]), int(index.flow_widths[sample]))
    yield from _jpeg_problems(data, index, sample, "frames", frame_size)
    yield from _jpeg_problems(data, index, sample, "flow", flow_size)


def _info_problems(members: dict[str, bytes], index: ShardIndex, sample: int, num_classes: int) -> Iterator[str]:
    """Compare `KEY.json` with the members and the index."""
    info: dict[str, Any] = json.loads(members["json"])
    for name in MEMBERS[1:]:
        if sha256(members[name]) != info["sha256"][name]:
            yield f"the sha256 of {name} is not the one in its json"
    expected = {"key": str(index.keys[sample]), "label": index.labels[sample], "frames": index.num_frames[sample]}
    expected |= {"height": index.heights[sample], "width": index.widths[sample]}
    expected |= {"flow_height": index.flow_heights[sample], "flow_width": index.flow_widths[sample]}
    for name, value in expected.items():
        if info[name] != value:
            yield f"{name} is {info[name]} in its json, {value} in the index"
    if not 0 <= info["label"] < num_classes:
        yield f"label {info['label']} of {num_classes} classes"
    yield from _array_problems(members, int(index.num_frames[sample]))


def _array_problems(members: dict[str, bytes], num_frames: int) -> Iterator[str]:
    motion, scores = (from_npy(members[name]) for name in MEMBERS[3:])
    if motion.dtype != np.uint8 or motion.shape != (num_frames, MAP_CELLS, MAP_CELLS):
        yield f"motion.npy is {motion.dtype} {motion.shape}, not a map for each of {num_frames} frames"
    if scores.dtype != np.float32 or scores.ndim != 1 or not 1 <= len(scores) <= num_frames:
        yield f"scores.npy is {scores.dtype} {scores.shape}, not a float32 for each start"


def _jpeg_problems(
    data: bytes, index: ShardIndex, sample: int, kind: StillKind, size: tuple[int, int]
) -> Iterator[str]:
    offset, num_bytes = index.members[sample][MEMBERS.index(f"{kind}.mjpg")].tolist()
    end = offset + num_bytes
    crcs = index.still_crcs(sample, kind).tolist()
    for number, (start, length) in enumerate(index.stills(sample, kind).tolist()):
        still = data[start : start + length]
        if start != offset or not (still.startswith(JPEG_START) and still.endswith(JPEG_END)):
            yield f"{kind} still {number} is not at its place in the index"
            return
        if jpeg_size(still) != size:
            yield f"{kind} still {number} is {jpeg_size(still)} (height, width), {size} in the index"
        if zlib.crc32(still) != crcs[number]:
            yield f"the checksum of {kind} still {number} is not that of the index"
        offset += length
    if offset != end:
        yield f"the {kind} stills do not fill their member"

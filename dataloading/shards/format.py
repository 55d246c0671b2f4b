"""The shard set on disk (format 1): writes and reads manifest, indices and tar members.

A folder holds `shard-000000.tar` … (plain webdataset), `shard-000000.index.npz` … (offsets of every member and
still) and `manifest.json`, which is written last: without it, a folder is no complete shard set.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset

from dataloading.shards.headers import to_npy
from dataloading.shards.index import CHECKSUMS, MEMBERS, TAR_HEADER, ShardIndex, max_index_bytes, parse_columns
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder, readable_errors

FORMAT = "mcl-shards"
VERSION = 1
MANIFEST = "manifest.json"
REPORT = "build.json"  # costs of the build; not part of the set, since times differ between builds
SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST = 2**28  # bytes; enough for a million shards
MAX_SHARD = 2**40  # bytes
ZERO_DIGEST = "0" * 64


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest; `seconds` is the playing time of its videos, where their files give a frame rate."""

    name: str
    samples: int
    frames: int
    bytes: int
    sha256: str
    index_sha256: str
    seconds: float = 0.0


@dataclass(frozen=True)
class RefusedVideo:
    """A source video that is not in the set, and the reason."""

    source: str
    reason: str


@dataclass(frozen=True)
class NearDuplicate:
    """A video that resembles an earlier one of the set; `bits` is the Hamming distance of their hashes."""

    source: str
    like: str
    bits: int


@dataclass(frozen=True)
class Manifest:
    """A complete shard set: resolved build configuration, class names by label, shards in order."""

    build: dict[str, Any]
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    refused: tuple[RefusedVideo, ...]
    near_duplicates: tuple[NearDuplicate, ...] = ()

    @property
    def num_videos(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_frames(self) -> int:
        """Frames of all videos."""
        return sum(shard.frames for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tar files."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_seconds(self) -> float:
        """Playing time of all videos."""
        return sum(shard.seconds for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which contains the digests of all shards."""
        return sha256(self.to_json())

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        totals = {"videos": self.num_videos, "frames": self.num_frames, "bytes": self.num_bytes}
        tree = {"format": FORMAT, "version": VERSION, "totals": totals, **asdict(self)}
        return add_digest(tree)


@dataclass(frozen=True)
class Sample:
    """One video in its stored form.

    Attributes:
        key: name inside the shard, `[A-Za-z0-9_-]+`.
        info: contents of `KEY.json` without the digests.
        frames, flow: N JPEG stills each.
        motion: uint8 (N, 7, 7) frame maps.
        scores: float32 (N - window + 1,) clip scores.
    """

    key: str
    info: dict[str, Any]
    frames: list[bytes]
    flow: list[bytes]
    motion: np.ndarray
    scores: np.ndarray

    @property
    def seconds(self) -> float:
        """Playing time; 0 when the video's file gives no frame rate."""
        rate = self.info["fps"]
        return float(self.info["frames"] / rate) if rate else 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of all stills, which are nearly the whole sample."""
        return sum(map(len, self.frames)) + sum(map(len, self.flow))

    def members(self) -> dict[str, bytes]:
        """Bytes of the tar members, in the order of `MEMBERS`."""
        data = {
            "frames.mjpg": b"".join(self.frames),
            "flow.mjpg": b"".join(self.flow),
            "motion.npy": to_npy(self.motion),
            "scores.npy": to_npy(self.scores),
        }
        digests = {name: sha256(member) for name, member in data.items()}
        info = {"key": self.key, **self.info, "sha256": digests}
        return {"json": json.dumps(info, indent=1).encode() + b"\n", **data}


class ShardWriter:
    """Writes samples into one local tar file and builds its index.

    The bytes depend on the samples alone: the tar records no time, owner or host. Every method that writes raises
    `UserError` when the disk is full or fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with readable_errors(str(path)):
            self._file = path.open("wb")
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, compress=False, mtime=0, user="", group="", mode=0o444
        )
        self._columns: dict[str, list[Any]] = {name: [] for name in ShardIndex.__dataclass_fields__}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Flushing may fail as the block did; the block's error is the one to report.
            with suppress(OSError), self._file:
                self._tar.close()
            return
        with readable_errors(str(self._path)), self._file:
            self._tar.close()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return int(self._tar.tarstream.offset)

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._columns["keys"])

    def add(self, sample: Sample) -> None:
        """Append one sample's members and index them and their stills."""
        extents, crcs = [], []
        for name, data in sample.members().items():
            extents.append((self.num_bytes + TAR_HEADER, len(data)))
            crcs.append(zlib.crc32(data))
            # One call per member: webdataset sorts the members of one call by name.
            with readable_errors(str(self._path)):
                self._tar.write({"__key__": sample.key, name: data})
        info = sample.info
        row = {"keys": sample.key, "labels": info["label"], "num_frames": info["frames"]}
        row |= {"members": extents, "member_crcs": crcs}
        row |= {f"{side}s": info[side] for side in ("height", "width", "flow_height", "flow_width")}
        for name, value in row.items():
            self._columns[name].append(value)
        for kind, stills in (("frame", sample.frames), ("flow", sample.flow)):
            member = MEMBERS.index("frames.mjpg" if kind == "frame" else "flow.mjpg")
            self._columns[f"{kind}_stills"] += _still_extents(stills, extents[member][0])
            self._columns[f"{kind}_crcs"] += map(zlib.crc32, stills)

    def index(self) -> ShardIndex:
        """The index of the samples so far."""
        kinds = {"keys": np.str_, **dict.fromkeys(CHECKSUMS, np.uint32)}
        return ShardIndex(
            **{name: np.array(column, dtype=kinds.get(name, np.int64)) for name, column in self._columns.items()}
        )


def shard_name(number: int) -> str:
    """`0` → `shard-000000.tar`."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """`shard-000000.tar` → `shard-000000.index.npz`."""
    return f"{shard.removesuffix('.tar')}.index.npz"


def read_index(folder: Folder, entry: ShardEntry) -> ShardIndex:
    """Read and check one shard's index.

    Raises:
        UserError: the file is missing, is not the one in the manifest, or is invalid.
    """
    name = index_name(entry.name)
    return parse_index(folder.head(name, max_shard_index_bytes(entry) + 1), entry, f"{folder.display_url}/{name}")


def parse_index(data: bytes, entry: ShardEntry, where: str) -> ShardIndex:
    """The index in a file's bytes; errors as in `read_index`, starting with `where`."""
    with _verified(data, entry, where):
        return ShardIndex.parse(data, samples=entry.samples, frames=entry.frames, num_bytes=entry.bytes)


def parse_index_columns(data: bytes, entry: ShardEntry, where: str) -> dict[str, np.ndarray]:
    """The small columns of the index in a file's bytes (`parse_columns`); errors as in `parse_index`."""
    with _verified(data, entry, where):
        return parse_columns(data, samples=entry.samples, frames=entry.frames)


@contextmanager
def _verified(data: bytes, entry: ShardEntry, where: str) -> Iterator[None]:
    if sha256(data) != entry.index_sha256:
        raise UserError(f"{where}: its digest differs from the manifest's; rebuild the set")
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}; rebuild the set") from error


def max_shard_index_bytes(entry: ShardEntry) -> int:
    """Upper bound of the size of this shard's index, in bytes."""
    return max_index_bytes(entry.samples, entry.frames)


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def read_complete_manifest(folder: Folder) -> Manifest:
    """Read the manifest and check that its shards exist with the recorded sizes.

    Raises:
        UserError: no manifest, another format or version, or a shard that is missing or of another size.
    """
    manifest = read_manifest(folder)
    present = set(folder.names())
    for shard in manifest.shards:
        for name in (shard.name, index_name(shard.name)):
            if name not in present:
                raise UserError(f"{folder.display_url}/{name}: missing, but listed in the manifest; rebuild the set")
        size = folder.size(shard.name)
        if size != shard.bytes:
            raise UserError(
                f"{folder.display_url}/{shard.name}: {size} bytes, {shard.bytes} in the manifest; rebuild the set"
            )
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """Read the manifest without a check of the shards; errors as in `read_complete_manifest`."""
    if not folder.exists(MANIFEST):
        raise missing_manifest(folder.display_url)
    return parse_manifest(folder.read(MANIFEST), f"{folder.display_url}/{MANIFEST}")


def missing_manifest(url: str) -> UserError:
    """The error for a folder without a manifest."""
    return UserError(f"{url}/{MANIFEST}: missing, so this is no complete shard set; `mcl shards build` writes one")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes; errors as in `read_complete_manifest`, starting with `where`."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); rebuild the set") from error
    found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{where}: format {str(found[0])[:40]!r} version {str(found[1])[:40]}, must be {FORMAT!r} version "
            f"{VERSION}; rebuild the set or use the program that wrote it"
        )
    try:
        if not has_valid_digest(data, tree):
            raise ValueError("its own digest is wrong, or missing as in sets of an earlier version")
        return _build_manifest(tree)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: damaged ({error}); rebuild the set") from error


def is_valid_manifest(data: bytes) -> bool:
    """Whether the bytes are a manifest with the right digest."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and has_valid_digest(data, tree)


def add_digest(tree: dict[str, Any]) -> bytes:
    """A manifest's bytes, with their own digest: the SHA-256 of the bytes with zeros in the digest's place."""
    text = json.dumps({**tree, "sha256": ZERO_DIGEST}, indent=1).encode() + b"\n"
    return _replace_digest(text, ZERO_DIGEST, sha256(text))


def has_valid_digest(data: bytes, tree: dict[str, Any]) -> bool:
    """Whether a manifest's bytes have the digest that they contain."""
    digest = tree.get("sha256")
    return (
        isinstance(digest, str) and len(digest) == 64 and sha256(_replace_digest(data, digest, ZERO_DIGEST)) == digest
    )


def _replace_digest(text: bytes, old: str, new: str) -> bytes:
    # The manifest's own digest is the last one in the text.
    before, _, after = text.rpartition(old.encode())
    return before + new.encode() + after


def _build_manifest(tree: dict[str, Any]) -> Manifest:
    shards = tuple(ShardEntry(**entry) for entry in tree["shards"])
    for shard in shards:
        _check_entry(shard)
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("it lists a shard twice")
    refused = tuple(RefusedVideo(**entry) for entry in tree["refused"])
    near_duplicates = tuple(NearDuplicate(**entry) for entry in tree.get("near_duplicates", ()))
    manifest = Manifest(dict(tree["build"]), tuple(map(str, tree["classes"])), shards, refused, near_duplicates)
    totals = {"videos": manifest.num_videos, "frames": manifest.num_frames, "bytes": manifest.num_bytes}
    if tree["totals"] != totals:
        raise ValueError(f"totals {tree['totals']}, must be {totals}, the sums over its shards")
    return manifest


def _check_entry(shard: ShardEntry) -> None:
    # A manifest is untrusted: a name must not lead out of the folder.
    if not SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"{shard.name!r} is not a shard's name")
    if not (DIGEST.fullmatch(shard.sha256) and DIGEST.fullmatch(shard.index_sha256)):
        raise ValueError(f"{shard.name} has an invalid digest")
    numbers = (shard.samples, shard.frames, shard.bytes)
    if any(type(number) is not int for number in numbers) or min(numbers) < 1:
        raise ValueError(f"{shard.name} has a count below 1, or one that is no integer")
    # A sample takes at least its members' headers, a frame one byte for each of its two stills.
    if shard.samples * len(MEMBERS) * TAR_HEADER + shard.frames * 2 > shard.bytes or shard.bytes > MAX_SHARD:
        raise ValueError(f"{shard.name} has more samples and frames than its bytes can hold, or is too large")


def _still_extents(stills: Sequence[bytes], start: int) -> list[tuple[int, int]]:
    starts = list(accumulate(map(len, stills), initial=start))
    return [(start, len(still)) for start, still in zip(starts, stills, strict=False)]

"""The shard set on disk (format 1): manifest, index and tar members, written here and read here.

A folder holds `shard-000000.tar` … (plain webdataset), `shard-000000.index.npz` … (where every member and
every still lies) and `manifest.json`, written last: a folder without it is no shard set.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import webdataset

from dataloading.shards.index import CHECKSUMS, MEMBERS, TAR_HEADER, ShardIndex, max_index_bytes, parse_columns
from dataloading.shards.npy import to_npy
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

FORMAT = "mcl-shards"
VERSION = 1
MANIFEST = "manifest.json"
REPORT = "build.json"  # what the build took: times differ, so it is no part of the set
SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST = 2**28  # bytes: of a set of a million shards
MAX_SHARD = 2**40
UNSEALED = "0" * 64


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `seconds` is its videos' playing time, as far as their files tell a rate."""

    name: str
    samples: int
    frames: int
    bytes: int
    sha256: str
    index_sha256: str
    seconds: float = 0.0


@dataclass(frozen=True)
class RefusedVideo:
    """A source that was not stored, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class NearDuplicate:
    """A video that looks like an earlier one of the set, and in how many bits of the hash they differ."""

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
        """SHA-256 of the manifest, and so of all it names."""
        return sha256(self.to_json())

    def to_json(self) -> bytes:
        """The text of `manifest.json`."""
        totals = {"videos": self.num_videos, "frames": self.num_frames, "bytes": self.num_bytes}
        tree = {"format": FORMAT, "version": VERSION, "totals": totals, **asdict(self)}
        return sealed(tree)


@dataclass(frozen=True)
class Sample:
    """One video as it is stored.

    Attributes:
        key: name inside the shard, `[A-Za-z0-9_-]+`.
        info: what `KEY.json` says, but for the digests.
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
        """Playing time; 0 when the video's file does not tell its rate."""
        rate = self.info["fps"]
        return float(self.info["frames"] / rate) if rate else 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of all stills, which is nearly all that is stored."""
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
    """Writes samples into one local tar file and collects its index.

    The bytes depend on the samples alone: no time, owner or host is recorded. Every method that writes
    raises `UserError` when the disk is full or fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _naming(path):
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
            # What is still buffered may fail the way that brought us here; that error is the one to tell.
            with suppress(OSError), self._file:
                self._tar.close()
            return
        with _naming(self._path), self._file:
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
        """Append one sample's members and note where they and their stills lie."""
        places, crcs = [], []
        for name, data in sample.members().items():
            places.append((self.num_bytes + TAR_HEADER, len(data)))
            crcs.append(zlib.crc32(data))
            # One call a member: a sample written as a whole would be sorted by name.
            with _naming(self._path):
                self._tar.write({"__key__": sample.key, name: data})
        info = sample.info
        row = {"keys": sample.key, "labels": info["label"], "num_frames": info["frames"]}
        row |= {"members": places, "member_crcs": crcs}
        row |= {f"{side}s": info[side] for side in ("height", "width", "flow_height", "flow_width")}
        for name, value in row.items():
            self._columns[name].append(value)
        for kind, stills in (("frame", sample.frames), ("flow", sample.flow)):
            member = MEMBERS.index("frames.mjpg" if kind == "frame" else "flow.mjpg")
            self._columns[f"{kind}_stills"] += _still_places(stills, places[member][0])
            self._columns[f"{kind}_crcs"] += map(zlib.crc32, stills)

    def index(self) -> ShardIndex:
        """The index of what was written."""
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
        UserError: the file is missing, is not the one that the manifest names, or is no index.
    """
    name = index_name(entry.name)
    return index_from(folder.head(name, max_index_size(entry) + 1), entry, f"{folder.url}/{name}")


def index_from(data: bytes, entry: ShardEntry, where: str) -> ShardIndex:
    """The index in a file's bytes; errors, which begin with `where`, as in `read_index`."""
    with _trusted(data, entry, where):
        return ShardIndex.parse(data, samples=entry.samples, frames=entry.frames, num_bytes=entry.bytes)


def columns_from(data: bytes, entry: ShardEntry, where: str) -> dict[str, np.ndarray]:
    """The small columns of the index in a file's bytes (`parse_columns`); errors as of `index_from`."""
    with _trusted(data, entry, where):
        return parse_columns(data, samples=entry.samples, frames=entry.frames)


@contextmanager
def _trusted(data: bytes, entry: ShardEntry, where: str) -> Iterator[None]:
    if sha256(data) != entry.index_sha256:
        raise UserError(f"{where}: not the index that the manifest names; rebuild the set")
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}; rebuild the set") from error


def max_index_size(entry: ShardEntry) -> int:
    """Bytes that no index of this shard exceeds."""
    return max_index_bytes(entry.samples, entry.frames)


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Folder) -> Manifest:
    """Read the manifest and check that its shards are there with the sizes it says.

    Raises:
        UserError: no manifest, another format or version, or a shard that is missing or of another size.
    """
    manifest = parse_manifest(folder)
    present = set(folder.names())
    for shard in manifest.shards:
        for name in (shard.name, index_name(shard.name)):
            if name not in present:
                raise UserError(f"{folder.url}/{name}: missing, but the manifest names it; rebuild the set")
        size = folder.size(shard.name)
        if size != shard.bytes:
            raise UserError(
                f"{folder.url}/{shard.name}: {size} bytes, the manifest says {shard.bytes}; rebuild the set"
            )
    return manifest


def parse_manifest(folder: Folder) -> Manifest:
    """Read the manifest alone, without a look at the shards; errors as in `read_manifest`."""
    if not folder.exists(MANIFEST):
        raise UserError(
            f"{folder.url}/{MANIFEST}: missing, so this is no complete shard set; `mcl shards build` writes one"
        )
    return manifest_from(folder.read(MANIFEST), f"{folder.url}/{MANIFEST}")


def manifest_from(data: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes; errors, which begin with `where`, as in `read_manifest`."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); rebuild the set") from error
    found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{where}: format {str(found[0])[:40]!r} version {str(found[1])[:40]}, this program reads {FORMAT!r} "
            f"{VERSION}; rebuild the set or use the program that wrote it"
        )
    try:
        if not is_sealed(data, tree):
            raise ValueError("its own digest is wrong, or missing as in sets of an earlier version")
        return _manifest(tree)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: damaged ({error}); rebuild the set") from error


def manifest_is_right(data: bytes) -> bool:
    """Whether these bytes are a manifest as it was written."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and is_sealed(data, tree)


def sealed(tree: dict[str, Any]) -> bytes:
    """The text of a manifest with its own digest in it: the SHA-256 of the text with zeros in the digest's place."""
    text = json.dumps({**tree, "sha256": UNSEALED}, indent=1).encode() + b"\n"
    return _with_digest(text, UNSEALED, sha256(text))


def is_sealed(data: bytes, tree: dict[str, Any]) -> bool:
    """Whether a manifest's bytes are those that were written."""
    digest = tree.get("sha256")
    return isinstance(digest, str) and len(digest) == 64 and sha256(_with_digest(data, digest, UNSEALED)) == digest


def _with_digest(text: bytes, old: str, new: str) -> bytes:
    # It stands last, so what else looks like it is left alone.
    before, _, after = text.rpartition(old.encode())
    return before + new.encode() + after


def _manifest(tree: dict[str, Any]) -> Manifest:
    shards = tuple(ShardEntry(**entry) for entry in tree["shards"])
    for shard in shards:
        _check_entry(shard)
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("it names a shard twice")
    refused = tuple(RefusedVideo(**entry) for entry in tree["refused"])
    alike = tuple(NearDuplicate(**entry) for entry in tree.get("near_duplicates", ()))
    manifest = Manifest(dict(tree["build"]), tuple(map(str, tree["classes"])), shards, refused, alike)
    totals = {"videos": manifest.num_videos, "frames": manifest.num_frames, "bytes": manifest.num_bytes}
    if tree["totals"] != totals:
        raise ValueError(f"totals {tree['totals']}, its shards add up to {totals}")
    return manifest


def _check_entry(shard: ShardEntry) -> None:
    # A name is a file of this folder and nothing else: a manifest may come from anywhere.
    if not SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"{shard.name!r} is no shard's name")
    if not (DIGEST.fullmatch(shard.sha256) and DIGEST.fullmatch(shard.index_sha256)):
        raise ValueError(f"{shard.name} has no proper digests")
    numbers = (shard.samples, shard.frames, shard.bytes)
    if any(type(number) is not int for number in numbers) or min(numbers) < 1:
        raise ValueError(f"{shard.name} is said to be empty")
    # A sample takes its members' headers, a frame some bytes for each of its stills.
    if shard.samples * len(MEMBERS) * TAR_HEADER + shard.frames * 2 > shard.bytes or shard.bytes > MAX_SHARD:
        raise ValueError(f"{shard.name} is said to hold more than its bytes can")


def _still_places(stills: Sequence[bytes], start: int) -> list[tuple[int, int]]:
    places = []
    for still in stills:
        places.append((start, len(still)))
        start += len(still)
    return places


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{path}: no space left; free some, then run the same command again") from error
        raise UserError(f"{path}: {error.strerror}; check the disk") from error

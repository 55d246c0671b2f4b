"""A shard's index: offset, size and checksum of every member and every still."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dataloading.shards.headers import from_npy

KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")
MEMBERS = ("json", "frames.mjpg", "flow.mjpg", "motion.npy", "scores.npy")
TAR_HEADER = 512  # bytes of a ustar header, and the block that data is padded to
COLUMNS = ("labels", "num_frames", "heights", "widths", "flow_heights", "flow_widths")
TABLES = ("members", "member_crcs", "frame_stills", "frame_crcs", "flow_stills", "flow_crcs")
CHECKSUMS = ("member_crcs", "frame_crcs", "flow_crcs")

# Limits against damaged indices. No shard comes near them: 8K frames, and the JSON, maps and scores of one video.
MAX_SIDE = 16384
MAX_SMALL_MEMBER = 2**26
MAX_INDEX = 2**32
# Upper bounds of an index: its tables, keys of some hundred letters, and the zip format's own bytes.
BYTES_PER_SAMPLE, BYTES_PER_FRAME, ZIP_BYTES = 2048, 48, 8192

StillKind = Literal["frames", "flow"]


@dataclass(frozen=True)
class ShardIndex:
    """Extents and checksums in one shard of S samples; offsets and sizes are bytes inside the tar.

    Attributes:
        keys: str (S,).
        labels, num_frames, heights, widths, flow_heights, flow_widths: int64 (S,).
        members: int64 (S, 5, 2), offset and size, in the order of `MEMBERS`.
        member_crcs: uint32 (S, 5), CRC-32 of each member.
        frame_stills, flow_stills: int64 (sum of num_frames, 2), offset and size, videos concatenated.
        frame_crcs, flow_crcs: uint32 (sum of num_frames,), CRC-32 of each still.
    """

    keys: np.ndarray
    labels: np.ndarray
    num_frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    flow_heights: np.ndarray
    flow_widths: np.ndarray
    members: np.ndarray
    member_crcs: np.ndarray
    frame_stills: np.ndarray
    frame_crcs: np.ndarray
    flow_stills: np.ndarray
    flow_crcs: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def stills(self, sample: int, kind: StillKind) -> np.ndarray:
        """Offset and size of the sample's stills: int64 (N, 2)."""
        return self._rows(sample, self.frame_stills if kind == "frames" else self.flow_stills)

    def still_crcs(self, sample: int, kind: StillKind) -> np.ndarray:
        """CRC-32 of the sample's stills: uint32 (N,)."""
        return self._rows(sample, self.frame_crcs if kind == "frames" else self.flow_crcs)

    def _rows(self, sample: int, table: np.ndarray) -> np.ndarray:
        first = int(self.num_frames[:sample].sum())
        return table[first : first + int(self.num_frames[sample])]

    def to_bytes(self) -> bytes:
        """The npz file; equal indices give equal bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes, *, samples: int, frames: int, num_bytes: int) -> ShardIndex:
        """The index in an npz file's bytes, checked against the shard's number of samples, frames and bytes.

        Raises:
            ValueError: the bytes are not an index, do not fit the shard, or point outside it.
        """
        columns = parse_columns(data, samples=samples, frames=frames)
        index = cls(**columns, **_arrays(data, TABLES))
        index._check_tables(samples, frames)
        index._check_extents(num_bytes)
        return index

    def _check_tables(self, samples: int, frames: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {"members": (samples, len(MEMBERS), 2)}
        shapes |= {"member_crcs": (samples, len(MEMBERS))}
        shapes |= dict.fromkeys(("frame_stills", "flow_stills"), (frames, 2))
        shapes |= dict.fromkeys(("frame_crcs", "flow_crcs"), (frames,))
        for name, shape in shapes.items():
            _check_array(name, getattr(self, name), "u" if name in CHECKSUMS else "i", shape)

    def _check_extents(self, num_bytes: int) -> None:
        sizes = self.members[..., 1]
        small = np.delete(sizes, [MEMBERS.index("frames.mjpg"), MEMBERS.index("flow.mjpg")], axis=1)
        if small.max() > MAX_SMALL_MEMBER:
            raise ValueError(f"it has a member of more than {MAX_SMALL_MEMBER} bytes")
        _check_within(self.members.reshape(-1, 2), np.array([TAR_HEADER]), np.array([num_bytes]))
        for table, member in ((self.frame_stills, "frames.mjpg"), (self.flow_stills, "flow.mjpg")):
            starts, lengths = self.members[:, MEMBERS.index(member)].T
            _check_within(table, np.repeat(starts, self.num_frames), np.repeat(starts + lengths, self.num_frames))


def parse_columns(data: bytes, *, samples: int, frames: int) -> dict[str, np.ndarray]:
    """`keys` and the `COLUMNS` of the index in an npz file's bytes, without its tables; errors as in `parse`."""
    columns = _arrays(data, ("keys", *COLUMNS))
    for name, array in columns.items():
        _check_array(name, array, "U" if name == "keys" else "i", (samples,))
    if not all(map(KEY.fullmatch, columns["keys"].tolist())):
        raise ValueError("it has a key with characters other than letters, digits, - and _")
    num_frames = columns["num_frames"]
    if not (num_frames.min() >= 1 and num_frames.max() <= frames and num_frames.sum() == frames):
        raise ValueError("its tables do not fit the manifest: numbers of frames")
    for name in ("heights", "widths", "flow_heights", "flow_widths"):
        if not (columns[name].min() >= 1 and columns[name].max() <= MAX_SIDE):
            raise ValueError(f"it has images with a side of 0 or of more than {MAX_SIDE} pixels")
    return columns


def max_index_bytes(samples: int, frames: int) -> int:
    """Upper bound of the size in bytes of an index of so many samples and frames."""
    return min(samples * BYTES_PER_SAMPLE + frames * BYTES_PER_FRAME + ZIP_BYTES, MAX_INDEX)


def _check_within(extents: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    """Check that each (offset, size) lies between start and end, without a sum that could overflow."""
    offsets, sizes = extents.T
    if not ((offsets >= start) & (offsets <= end) & (sizes >= 0) & (sizes <= end - offsets)).all():
        raise ValueError("it points outside the shard")


def _check_array(name: str, array: np.ndarray, kind: str, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype.kind != kind:
        raise ValueError(f"its tables do not fit the manifest: {name} is {array.dtype} {array.shape}")


def _arrays(data: bytes, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an npz file; they take no more memory than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
            if packed or sum(entry.file_size for entry in entries.values()) > len(data):
                raise ValueError("it is compressed, or larger than its file")
            for name in (*CHECKSUMS, *names):
                if name not in entries:
                    raise ValueError(f"it has no {name}; sets of an earlier version have no checksums")
            return {name: from_npy(archive.read(entries[name])) for name in names}
    except (zipfile.BadZipFile, struct.error, zlib.error, RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"not an npz file ({error})") from error

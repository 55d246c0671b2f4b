"""Changes to shard sets that keep their digests consistent."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataloading.shards.format import MANIFEST, ShardEntry, index_name, parse_index, parse_manifest, sha256


def update_digests(folder: Path) -> None:
    """Recompute checksums and digests after a change of shard bytes; offsets must be unchanged."""
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), MANIFEST)
    entries = tuple(_update_entry(folder, entry) for entry in manifest.shards)
    (folder / MANIFEST).write_bytes(replace(manifest, shards=entries).to_json())


def _update_entry(folder: Path, entry: ShardEntry) -> ShardEntry:
    data = (folder / entry.name).read_bytes()
    path = folder / index_name(entry.name)
    index = parse_index(path.read_bytes(), entry, path.name)
    index = replace(
        index,
        member_crcs=_crcs(data, index.members),
        frame_crcs=_crcs(data, index.frame_stills),
        flow_crcs=_crcs(data, index.flow_stills),
    )
    path.write_bytes(index.to_bytes())
    return replace(entry, sha256=sha256(data), index_sha256=sha256(index.to_bytes()), bytes=len(data))


def _crcs(data: bytes, extents: np.ndarray) -> np.ndarray:
    crcs = [zlib.crc32(data[offset : offset + size]) for offset, size in extents.reshape(-1, 2).tolist()]
    return np.array(crcs, np.uint32).reshape(extents.shape[:-1])

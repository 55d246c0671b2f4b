"""Changing shard sets as only their builder could have."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataloading.shards.format import MANIFEST, ShardEntry, index_from, index_name, manifest_from, sha256


def reseal(folder: Path) -> None:
    """Make checksums and digests those of the shards as they are now; nothing may have moved."""
    manifest = manifest_from((folder / MANIFEST).read_bytes(), MANIFEST)
    entries = tuple(_resealed(folder, entry) for entry in manifest.shards)
    (folder / MANIFEST).write_bytes(replace(manifest, shards=entries).to_json())


def _resealed(folder: Path, entry: ShardEntry) -> ShardEntry:
    data = (folder / entry.name).read_bytes()
    path = folder / index_name(entry.name)
    index = index_from(path.read_bytes(), entry, path.name)
    index = replace(
        index,
        member_crcs=_crcs(data, index.members),
        frame_crcs=_crcs(data, index.frame_stills),
        flow_crcs=_crcs(data, index.flow_stills),
    )
    path.write_bytes(index.to_bytes())
    return replace(entry, sha256=sha256(data), index_sha256=sha256(index.to_bytes()), bytes=len(data))


def _crcs(data: bytes, places: np.ndarray) -> np.ndarray:
    crcs = [zlib.crc32(data[offset : offset + size]) for offset, size in places.reshape(-1, 2).tolist()]
    return np.array(crcs, np.uint32).reshape(places.shape[:-1])

"""Reading a shard set: of each video only the bytes that are asked for."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataloading.bad_sample import BadSampleError, Reason
from dataloading.index import MEMBERS, ShardIndex, StillKind
from dataloading.jpeg import jpeg_size
from dataloading.shards import ShardEntry, read_index, read_manifest
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage import Folder


class ShardSet:
    """All videos of a shard set, by their position in it (shards in the manifest's order).

    A set on this machine is read in place; of any other, a shard is fetched whole into `cache` when the
    first of its videos is read, checked against the manifest's digest, and kept.

    Attributes:
        manifest: what the set says of itself.
        keep_every: of how many frames of a video one is stored; all numbers of frames here are of stored ones.
        keys: str (videos,).
        labels, num_frames, heights, widths, flow_heights, flow_widths: int64 (videos,).

    Raises:
        UserError: as `read_manifest` and `ShardIndex.read`, and for a set of no videos.
        ConfigError: the set is elsewhere and there is no cache.
    """

    def __init__(self, url: str, cache: str | None = None) -> None:
        self._folder = Folder(url)
        if cache is None and not self._folder.is_local:
            raise ConfigError(
                f"data.cache: missing; {url} is not on this machine, name a local folder to keep its shards in"
            )
        self._cache = None if self._folder.is_local or cache is None else Path(cache)
        self.manifest = read_manifest(self._folder)
        if not self.manifest.shards:
            raise UserError(f"{self._folder.url}: holds no video; rebuild the set")
        self.keep_every = int(self.manifest.build.get("keep_every", 1))
        self._indices = [read_index(self._folder, entry) for entry in self.manifest.shards]
        self._first_position = np.cumsum([0, *(len(index) for index in self._indices)])
        self.keys = self._column("keys")
        self.labels = self._column("labels")
        self.num_frames = self._column("num_frames")
        self.heights = self._column("heights")
        self.widths = self._column("widths")
        self.flow_heights = self._column("flow_heights")
        self.flow_widths = self._column("flow_widths")

    def __len__(self) -> int:
        return len(self.keys)

    def stored_stride(self, stride: int) -> int:
        """Stored frames from one to the next of a clip, for a stride in frames of the videos themselves.

        Raises:
            ConfigError: the frames between are not stored.
        """
        if stride % self.keep_every:
            raise ConfigError(
                f"data.stride: found {stride}, must be a multiple of {self.keep_every}: of that many frames "
                "the set stores one (--keep-every)"
            )
        return stride // self.keep_every

    def read(self, position: int) -> StoredVideo:
        """The video at a position of the set: its maps and scores at once, its stills when asked for.

        Raises:
            BadSampleError: the shard does not hold what its index says of this video.
            UserError: the shard cannot be fetched.
        """
        shard = int(np.searchsorted(self._first_position, position, side="right")) - 1
        sample = position - int(self._first_position[shard])
        entry = self.manifest.shards[shard]
        return StoredVideo(self._local(entry), self._indices[shard], sample, f"{self._folder.url}/{entry.name}")

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(index, name) for index in self._indices])

    def _local(self, entry: ShardEntry) -> Path:
        if self._cache is None:
            return Path(self._folder.path(entry.name))
        # Named by content: sets may share a cache, and a rebuilt set finds nothing stale in it.
        cached = self._cache / f"{entry.sha256}.tar"
        if not cached.exists():
            self._fetch(entry, cached)
        return cached

    def _fetch(self, entry: ShardEntry, cached: Path) -> None:
        unchecked = cached.with_name(f".{cached.name}.{os.getpid()}.unchecked")
        self._folder.get(entry.name, unchecked)
        with unchecked.open("rb") as file:
            digest = _sha256(file)
        if digest != entry.sha256:
            unchecked.unlink()
            raise UserError(
                f"{self._folder.url}/{entry.name}: not the bytes that the manifest names; "
                f"run `mcl shards verify {self._folder.url}`"
            )
        unchecked.replace(cached)


class StoredVideo:
    """One video of a set.

    Attributes:
        where: URL of the shard and key, for messages.
        height, width, flow_height, flow_width: in pixels; a flow still holds two components of that size.
        num_frames: N.
        frame_maps: uint8 (N, 7, 7).
        clip_scores: float32 (N - window + 1,).
    """

    def __init__(self, path: Path, index: ShardIndex, sample: int, shard: str) -> None:
        self.where = f"{shard}, video {index.keys[sample]}"
        self._shard = shard
        self._path = path
        self._index = index
        self._sample = sample
        self.height, self.width = int(index.heights[sample]), int(index.widths[sample])
        self.flow_height, self.flow_width = int(index.flow_heights[sample]), int(index.flow_widths[sample])
        self.num_frames = int(index.num_frames[sample])
        self.frame_maps = self._array("motion.npy")
        self.clip_scores = self._array("scores.npy")
        if self.frame_maps.shape != (self.num_frames, 7, 7) or self.clip_scores.ndim != 1:
            raise self._damaged("maps", "its maps or scores do not fit its frames")

    def info(self) -> dict[str, Any]:
        """What the set says of the video itself: class, source, fps, flow…; `BadSampleError` when it is not JSON."""
        try:
            info = json.loads(self._member("json"))
        except ValueError as error:
            raise self._damaged("header", "its json cannot be read") from error
        if not isinstance(info, dict):
            raise self._damaged("header", "its json is no object")
        return info

    def frames(self, indices: Iterable[int]) -> list[np.ndarray]:
        """JPEG stills of these frames, uint8 (bytes,) each; `BadSampleError` when one is no such JPEG."""
        return self._stills("frames", indices, self.height, self.width)

    def flow(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Grey JPEG stills of these frames' flow, uint8 (bytes,) each, horizontal above vertical."""
        return self._stills("flow", indices, 2 * self.flow_height, self.flow_width)

    def _stills(self, kind: StillKind, indices: Iterable[int], height: int, width: int) -> list[np.ndarray]:
        table = self._index.stills(self._sample, kind)
        wanted = list(indices)
        stills = self._read(table[wanted])
        for index, still in zip(wanted, stills, strict=True):
            found = jpeg_size(still)
            if found != (height, width):
                what = "is not a whole JPEG" if found is None else f"is {found[1]}x{found[0]} pixels"
                reason: Reason = "header" if found is None else "size"
                raise self._damaged(reason, f"{kind} still {index} {what}, must be {width}x{height}")
        return [np.frombuffer(still, dtype=np.uint8) for still in stills]

    def _array(self, member: str) -> np.ndarray:
        try:
            array: np.ndarray = np.lib.format.read_array(io.BytesIO(self._member(member)), allow_pickle=False)
        except ValueError as error:
            raise self._damaged("maps", f"{member} is not a NumPy array") from error
        return array

    def _member(self, name: str) -> bytes:
        (data,) = self._read(self._index.members[self._sample, MEMBERS.index(name)][None])
        return data

    def _read(self, places: np.ndarray) -> list[bytes]:
        """The bytes at each (offset, size) of the shard."""
        try:
            with self._path.open("rb", buffering=0) as file:
                return [os.pread(file.fileno(), size, offset) for offset, size in places.tolist()]
        except OSError as error:
            raise self._damaged("missing", f"{self._path} cannot be read ({error.strerror})") from error

    def _damaged(self, reason: Reason, what: str) -> BadSampleError:
        return BadSampleError(self._shard, str(self._index.keys[self._sample]), reason, what)


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()

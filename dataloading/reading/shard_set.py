"""Reading a shard set: only the bytes that are needed of each video, all of them verified."""

from __future__ import annotations

import json
import threading
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloading.motion import MAP_CELLS
from dataloading.reading.fetcher import FetchConfig, Fetcher
from dataloading.reading.read_ahead import ReadAhead
from dataloading.reading.read_counters import Counters, ReadCounters
from dataloading.reading.shard_cache import Fill, ShardCache
from dataloading.reading.shard_indices import ShardIndices
from dataloading.reading.shard_source import CachedShard, LocalShard, RemoteShard, ShardSource
from dataloading.shards.bad_sample import BadSampleError
from dataloading.shards.format import (
    MANIFEST,
    MAX_MANIFEST,
    Manifest,
    ShardEntry,
    is_valid_manifest,
    missing_manifest,
    parse_manifest,
)
from dataloading.shards.headers import from_npy, jpeg_size
from dataloading.shards.index import MEMBERS, ShardIndex, StillKind
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.events import BadSampleReason
from mcl_dist.storage.folder import Folder, MissingFileError


class ShardSet:
    """All videos of a shard set, by their position in it (shards in the manifest's order).

    A local set is read in place. Shards of a remote set are fetched whole into `cache`, when one of their videos is
    expected or read, or only the ranges of bytes that are needed (`config.fetch`); either way the cache holds the
    indices. A set belongs to the process that created it.

    Attributes:
        manifest: of the set.
        keep_every: one of so many frames of a video is stored; all numbers of frames here count stored frames.
        keys: str (videos,).
        labels, num_frames, heights, widths, flow_heights, flow_widths: int64 (videos,).

    Raises:
        UserError: the manifest or an index cannot be read or is invalid, or the set has no videos.
        ConfigError: the set is remote and there is no cache.
    """

    def __init__(self, url: str, cache: str | None = None, config: FetchConfig | None = None) -> None:
        config = config or FetchConfig()
        self._counters = ReadCounters()
        self._folder = Folder(url, config.retry_policy(self._counters))
        self._url = self._folder.display_url
        if cache is None and not self._folder.is_local:
            raise ConfigError(
                f"data.cache: missing; {self._url} is not on this machine, set a local folder to cache its shards"
            )
        self._fetcher = Fetcher(self._folder, self._counters)
        self.manifest = self._read_manifest()
        self.keep_every = self._read_keep_every()
        self._cache: ShardCache | None = None
        self._ahead: ReadAhead | None = None
        index_cache = None
        if cache is not None and not self._folder.is_local:
            index_cache = ShardCache(Path(cache) / "indices", None, ReadCounters(), suffix=".npz")
            if config.fetch == "whole":
                self._cache = ShardCache(Path(cache), config.cache_limit, self._counters)
                self._ahead = ReadAhead(self._fetch_ahead)
        with self._counters.timed("index"):
            self._indices = ShardIndices(self.manifest, self._fetcher, index_cache)
        self._sources: weakref.WeakValueDictionary[int, ShardSource] = weakref.WeakValueDictionary()
        self._sources_lock = threading.Lock()
        columns = self._indices.columns
        self.keys, self.labels, self.num_frames = columns["keys"], columns["labels"], columns["num_frames"]
        self.heights, self.widths = columns["heights"], columns["widths"]
        self.flow_heights, self.flow_widths = columns["flow_heights"], columns["flow_widths"]

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """End background work; videos that were read stay readable unless that needs a fetch."""
        if self._ahead is not None:
            self._ahead.close()
        self._fetcher.close()
        if self._cache is not None:
            self._cache.close()

    def counters(self) -> Counters:
        """Counters of reading so far; see `ReadCounters.snapshot`."""
        return self._counters.snapshot()

    def expect(self, positions: Iterable[int]) -> None:
        """Replace the videos that this process will read next, in order.

        Their shards are prefetched and evicted last. Cheap enough to call for each batch.
        """
        if self._cache is None or self._ahead is None:
            return
        shards = list(dict.fromkeys(self._shards_of(np.fromiter(positions, np.int64)).tolist()))
        self._cache.expect([self.manifest.shards[shard].sha256 for shard in shards])
        self._ahead.expect(shards)

    def name_of(self, position: int) -> str:
        """URL of the shard and key, for messages."""
        (shard,) = self._shards_of(np.array([position])).tolist()
        return f"{self._shard_url(shard)}, video {self.keys[position]}"

    def stored_stride(self, stride: int, key: str = "data.stride") -> int:
        """A clip's stride in stored frames, for a stride in frames of the videos.

        `key` is the configuration key of the stride, for the message.

        Raises:
            ConfigError: the frames between are not stored.
        """
        if stride % self.keep_every:
            raise ConfigError(
                f"{key}: found {stride}, must be a multiple of {self.keep_every}: {self._url} stores one of "
                f"{self.keep_every} frames (--keep-every)"
            )
        return stride // self.keep_every

    def read(self, position: int) -> StoredVideo:
        """The video at a position of the set: reads its maps and scores now, its stills on demand.

        Raises:
            BadSampleError: the shard is missing, or contradicts its index in this video.
            UserError: the store or the cache's disk cannot be used.
        """
        (shard,) = self._shards_of(np.array([position])).tolist()
        sample = position - int(self._indices.first_positions[shard])
        try:
            source = self._source(shard)
        except (OSError, MissingFileError) as error:
            what = f"its shard cannot be read ({getattr(error, 'strerror', None) or 'no such file'})"
            raise BadSampleError(self._shard_url(shard), str(self.keys[position]), "missing", what) from error
        return StoredVideo(source, self._indices[shard], sample, self._shard_url(shard), self._counters)

    def _shards_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._indices.first_positions, positions, side="right") - 1

    def _shard_url(self, shard: int) -> str:
        return f"{self._url}/{self.manifest.shards[shard].name}"

    def _read_manifest(self) -> Manifest:
        try:
            data = self._fetcher.small_file(MANIFEST, MAX_MANIFEST, is_valid_manifest)
        except MissingFileError as error:
            raise missing_manifest(self._url) from error
        manifest = parse_manifest(data, f"{self._url}/{MANIFEST}")
        if not manifest.shards:
            raise UserError(f"{self._url}: holds no video; rebuild the set")
        return manifest

    def _read_keep_every(self) -> int:
        keep_every = self.manifest.build.get("keep_every", 1)
        if type(keep_every) is not int or keep_every < 1:
            raise UserError(f"{self._url}/{MANIFEST}: keep_every is {str(keep_every)[:40]!r}; rebuild the set")
        return keep_every

    def _source(self, shard: int) -> ShardSource:
        """The open shard, shared by all videos that are being read from it."""
        with self._sources_lock:
            source = self._sources.get(shard)
        if source is None:
            source = self._open(self.manifest.shards[shard])
            with self._sources_lock:
                self._sources[shard] = source
        return source

    def _open(self, entry: ShardEntry) -> ShardSource:
        if self._folder.is_local:
            return LocalShard(self._folder.path(entry.name), self._counters)
        if self._cache is None:
            return RemoteShard(self._fetcher, entry.name, self._counters)
        return CachedShard(self._cache, entry, self._fill(entry), self._counters)

    def _fetch_ahead(self, shard: int) -> bool:
        entry = self.manifest.shards[shard]
        return self._cache is not None and self._cache.fetch_ahead(entry.sha256, entry.bytes, self._fill(entry))

    def _fill(self, entry: ShardEntry) -> Fill:
        return lambda descriptor: self._fetcher.shard(entry.name, entry.bytes, entry.sha256, descriptor)


class StoredVideo:
    """One video of a set.

    Attributes:
        where: URL of the shard and key, for messages.
        height, width, flow_height, flow_width: in pixels; a flow still holds two components of that size.
        num_frames: N.
        frame_maps: uint8 (N, 7, 7).
        clip_scores: float32 (N - window + 1,).
    """

    def __init__(
        self, source: ShardSource, index: ShardIndex, sample: int, shard_url: str, counters: ReadCounters
    ) -> None:
        self.where = f"{shard_url}, video {index.keys[sample]}"
        self._shard_url = shard_url
        self._source = source
        self._counters = counters
        self._index = index
        self._sample = sample
        self.height, self.width = int(index.heights[sample]), int(index.widths[sample])
        self.flow_height, self.flow_width = int(index.flow_heights[sample]), int(index.flow_widths[sample])
        self.num_frames = int(index.num_frames[sample])
        self.frame_maps, self.clip_scores = self._arrays()

    def info(self) -> dict[str, Any]:
        """The video's json: class, source, fps, flow…; `BadSampleError` when it is not JSON."""
        try:
            info = json.loads(self._members("json")[0])
        except (ValueError, RecursionError) as error:
            raise self._bad("header", "its json cannot be read") from error
        if not isinstance(info, dict):
            raise self._bad("header", "its json is no object")
        return info

    def frames(self, indices: Iterable[int]) -> list[np.ndarray]:
        """JPEG stills of these frames, uint8 (bytes,) each; `BadSampleError` when one is no JPEG of the right size."""
        return self._stills("frames", indices, self.height, self.width)

    def flow(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Grey JPEG stills of these frames' flow, uint8 (bytes,) each, horizontal above vertical."""
        return self._stills("flow", indices, 2 * self.flow_height, self.flow_width)

    def decode_error(self, what: str) -> BadSampleError:
        """The error for a still that passed all checks and that the decoder rejects."""
        return self._bad("decode", what)

    def _stills(self, kind: StillKind, indices: Iterable[int], height: int, width: int) -> list[np.ndarray]:
        wanted = list(indices)
        extents, crcs = self._index.stills(self._sample, kind), self._index.still_crcs(self._sample, kind)
        stills = self._read(extents[wanted], crcs[wanted], [f"{kind} still {index}" for index in wanted])
        for index, still in zip(wanted, stills, strict=True):
            found = jpeg_size(still)
            if found is None:
                raise self._bad("header", f"{kind} still {index} is not a whole JPEG")
            if found != (height, width):
                what = f"{kind} still {index} is {found[1]}x{found[0]} pixels, must be {width}x{height}"
                raise self._bad("size", what)
        self._counters.add("bytes_decoded", sum(map(len, stills)))
        return [np.frombuffer(still, dtype=np.uint8) for still in stills]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            maps, scores = map(from_npy, self._members("motion.npy", "scores.npy"))
        except ValueError as error:
            raise self._bad("maps", "its maps or scores are not NumPy arrays") from error
        fits = maps.shape == (self.num_frames, MAP_CELLS, MAP_CELLS) and scores.ndim == 1
        if not fits or len(scores) > self.num_frames or maps.dtype != np.uint8 or scores.dtype != np.float32:
            raise self._bad("maps", "its maps or scores do not fit its frames")
        return maps, scores

    def _members(self, *names: str) -> list[bytes]:
        rows = [MEMBERS.index(name) for name in names]
        return self._read(self._index.members[self._sample, rows], self._index.member_crcs[self._sample, rows], names)

    def _read(self, extents: np.ndarray, crcs: np.ndarray, names: Sequence[str]) -> list[bytes]:
        """The verified bytes at each (offset, size) of the shard."""
        try:
            pieces = self._source.read(extents, crcs)
        except (OSError, MissingFileError) as error:
            raise self._bad("missing", f"its shard cannot be read ({error})") from error
        for piece, size, crc, name in zip(pieces, extents[:, 1].tolist(), crcs.tolist(), names, strict=True):
            if len(piece) != size:
                raise self._bad("missing", f"{name} is beyond the end of the shard")
            if zlib.crc32(piece) != crc:
                raise self._bad("checksum", f"{name} does not match its checksum")
        return pieces

    def _bad(self, reason: BadSampleReason, what: str) -> BadSampleError:
        return BadSampleError(self._shard_url, str(self._index.keys[self._sample]), reason, what)

"""Reading a shard set: of each video only the bytes that are asked for, and every byte checked before it is used."""

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
from dataloading.reading.shard_source import CachedFile, FetchedRanges, FileInPlace, ShardSource
from dataloading.reading.store import MissingFileError, RangeReader
from dataloading.shards.bad_sample import BadSampleError, Reason
from dataloading.shards.format import MANIFEST, MAX_MANIFEST, Manifest, ShardEntry, manifest_from, manifest_is_right
from dataloading.shards.index import MEMBERS, ShardIndex, StillKind
from dataloading.shards.jpeg import jpeg_size
from dataloading.shards.npy import from_npy
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder
from mcl_dist.storage.store_requests import without_credentials


class ShardSet:
    """All videos of a shard set, by their position in it (shards in the manifest's order).

    A set on this machine is read in place. Of any other, a shard is fetched whole into `cache` when it is expected
    or the first of its videos is read, or just the ranges of bytes that are asked for, as `config.fetch` says; the
    cache holds the indices in both cases. It belongs to the process that made it.

    Attributes:
        manifest: what the set says of itself.
        keep_every: of how many frames of a video one is stored; all numbers of frames here are of stored ones.
        keys: str (videos,).
        labels, num_frames, heights, widths, flow_heights, flow_widths: int64 (videos,).

    Raises:
        UserError: manifest or indices cannot be read or are not what they should be, or the set has no videos.
        ConfigError: the set is elsewhere and there is no cache.
    """

    def __init__(self, url: str, cache: str | None = None, config: FetchConfig | None = None) -> None:
        config = config or FetchConfig()
        self._url = without_credentials(url.rstrip("/"))
        self._report = ReadCounters()
        self._folder = Folder(url)
        if cache is None and not self._folder.is_local:
            raise ConfigError(
                f"data.cache: missing; {self._url} is not on this machine, name a local folder to keep its shards in"
            )
        self._fetcher = Fetcher(RangeReader(url), config, self._report)
        self.manifest = self._read_manifest()
        self.keep_every = self._stored_frames()
        self._cache: ShardCache | None = None
        self._ahead: ReadAhead | None = None
        index_cache = None
        if cache is not None and not self._folder.is_local:
            index_cache = ShardCache(Path(cache) / "indices", None, ReadCounters(), suffix=".npz")
            if config.fetch == "whole":
                self._cache = ShardCache(Path(cache), config.cache_limit, self._report)
                self._ahead = ReadAhead(self._fetch_ahead)
        with self._report.timed("index"):
            self._indices = ShardIndices(self.manifest, self._fetcher, index_cache)
        self._open: weakref.WeakValueDictionary[int, ShardSource] = weakref.WeakValueDictionary()
        self._opening = threading.Lock()
        columns = self._indices.columns
        self.keys, self.labels, self.num_frames = columns["keys"], columns["labels"], columns["num_frames"]
        self.heights, self.widths = columns["heights"], columns["widths"]
        self.flow_heights, self.flow_widths = columns["flow_heights"], columns["flow_widths"]

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        """End what goes on in the background; videos that were read stay readable where nothing must be fetched."""
        if self._ahead is not None:
            self._ahead.close()
        self._fetcher.close()
        if self._cache is not None:
            self._cache.close()

    def counters(self) -> Counters:
        """What reading has taken so far; see `ReadCounters.counters`."""
        return self._report.counters()

    def expect(self, positions: Iterable[int]) -> None:
        """Videos that this process will read next, in this order; what was expected before is forgotten.

        Their shards are fetched ahead and are the last to be evicted. May be called as often as each batch.
        """
        if self._cache is None or self._ahead is None:
            return
        shards = list(dict.fromkeys(self._shards_of(np.fromiter(positions, np.int64)).tolist()))
        self._cache.expect([self.manifest.shards[shard].sha256 for shard in shards])
        self._ahead.expect(shards)

    def name_of(self, position: int) -> str:
        """URL of the shard and key, as messages have them."""
        (shard,) = self._shards_of(np.array([position])).tolist()
        return f"{self._shard_url(shard)}, video {self.keys[position]}"

    def stored_stride(self, stride: int, key: str = "data.stride") -> int:
        """Stored frames from one to the next of a clip, for a stride in frames of the videos themselves.

        `key` is where the stride is configured, for the message.

        Raises:
            ConfigError: the frames between are not stored.
        """
        if stride % self.keep_every:
            raise ConfigError(
                f"{key}: found {stride}, must be a multiple of {self.keep_every}: of that many frames "
                f"{self._url} stores one (--keep-every)"
            )
        return stride // self.keep_every

    def read(self, position: int) -> StoredVideo:
        """The video at a position of the set: its maps and scores at once, its stills when asked for.

        Raises:
            BadSampleError: the shard does not hold what its index says of this video, or is not there.
            UserError: the store or the cache's disk cannot be used.
        """
        (shard,) = self._shards_of(np.array([position])).tolist()
        sample = position - int(self._indices.first_positions[shard])
        try:
            source = self._opened(shard)
        except (OSError, MissingFileError) as error:
            what = f"its shard cannot be read ({getattr(error, 'strerror', None) or 'no such file'})"
            raise BadSampleError(self._shard_url(shard), str(self.keys[position]), "missing", what) from error
        return StoredVideo(source, self._indices[shard], sample, self._shard_url(shard), self._report)

    def _shards_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._indices.first_positions, positions, side="right") - 1

    def _shard_url(self, shard: int) -> str:
        return f"{self._url}/{self.manifest.shards[shard].name}"

    def _read_manifest(self) -> Manifest:
        where = f"{self._url}/{MANIFEST}"
        try:
            manifest = manifest_from(self._fetcher.small_file(MANIFEST, MAX_MANIFEST, manifest_is_right), where)
        except MissingFileError as error:
            raise UserError(
                f"{where}: missing, so this is no complete shard set; `mcl shards build` writes one"
            ) from error
        if not manifest.shards:
            raise UserError(f"{self._url}: holds no video; rebuild the set")
        return manifest

    def _stored_frames(self) -> int:
        keep_every = self.manifest.build.get("keep_every", 1)
        if type(keep_every) is not int or keep_every < 1:
            raise UserError(f"{self._url}/{MANIFEST}: says keep_every {str(keep_every)[:40]!r}; rebuild the set")
        return keep_every

    def _opened(self, shard: int) -> ShardSource:
        """The shard, which videos that are read at the same time share."""
        with self._opening:
            source = self._open.get(shard)
        if source is None:
            source = self._new_source(self.manifest.shards[shard])
            with self._opening:
                self._open[shard] = source
        return source

    def _new_source(self, entry: ShardEntry) -> ShardSource:
        if self._folder.is_local:
            return FileInPlace(self._folder.path(entry.name), self._report)
        if self._cache is None:
            return FetchedRanges(self._fetcher, entry.name, self._report)
        return CachedFile(self._cache, entry, self._fill(entry), self._report)

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
        self, source: ShardSource, index: ShardIndex, sample: int, shard_url: str, report: ReadCounters
    ) -> None:
        self.where = f"{shard_url}, video {index.keys[sample]}"
        self._shard_url = shard_url
        self._source = source
        self._report = report
        self._index = index
        self._sample = sample
        self.height, self.width = int(index.heights[sample]), int(index.widths[sample])
        self.flow_height, self.flow_width = int(index.flow_heights[sample]), int(index.flow_widths[sample])
        self.num_frames = int(index.num_frames[sample])
        self.frame_maps, self.clip_scores = self._arrays()

    def info(self) -> dict[str, Any]:
        """What the set says of the video itself: class, source, fps, flow…; `BadSampleError` when it is not JSON."""
        try:
            info = json.loads(self._members("json")[0])
        except (ValueError, RecursionError) as error:
            raise self._bad("header", "its json cannot be read") from error
        if not isinstance(info, dict):
            raise self._bad("header", "its json is no object")
        return info

    def frames(self, indices: Iterable[int]) -> list[np.ndarray]:
        """JPEG stills of these frames, uint8 (bytes,) each; `BadSampleError` when one is no such JPEG."""
        return self._stills("frames", indices, self.height, self.width)

    def flow(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Grey JPEG stills of these frames' flow, uint8 (bytes,) each, horizontal above vertical."""
        return self._stills("flow", indices, 2 * self.flow_height, self.flow_width)

    def undecodable(self, what: str) -> BadSampleError:
        """The error of a still that passed all checks and that the decoder refuses all the same."""
        return self._bad("decode", what)

    def _stills(self, kind: StillKind, indices: Iterable[int], height: int, width: int) -> list[np.ndarray]:
        wanted = list(indices)
        places, crcs = self._index.stills(self._sample, kind), self._index.still_crcs(self._sample, kind)
        stills = self._read(places[wanted], crcs[wanted], [f"{kind} still {index}" for index in wanted])
        for index, still in zip(wanted, stills, strict=True):
            found = jpeg_size(still)
            if found is None:
                raise self._bad("header", f"{kind} still {index} is not a whole JPEG")
            if found != (height, width):
                what = f"{kind} still {index} is {found[1]}x{found[0]} pixels, must be {width}x{height}"
                raise self._bad("size", what)
        self._report.add("bytes_decoded", sum(map(len, stills)))
        return [np.frombuffer(still, dtype=np.uint8) for still in stills]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            maps, scores = map(from_npy, self._members("motion.npy", "scores.npy"))
        except ValueError as error:
            raise self._bad("maps", "its maps or scores are no NumPy arrays") from error
        fits = maps.shape == (self.num_frames, MAP_CELLS, MAP_CELLS) and scores.ndim == 1
        if not fits or len(scores) > self.num_frames or maps.dtype != np.uint8 or scores.dtype != np.float32:
            raise self._bad("maps", "its maps or scores do not fit its frames")
        return maps, scores

    def _members(self, *names: str) -> list[bytes]:
        rows = [MEMBERS.index(name) for name in names]
        return self._read(self._index.members[self._sample, rows], self._index.member_crcs[self._sample, rows], names)

    def _read(self, places: np.ndarray, crcs: np.ndarray, names: Sequence[str]) -> list[bytes]:
        """The bytes at each (offset, size) of the shard, found to be those that were stored."""
        try:
            pieces = self._source.read(places, crcs)
        except (OSError, MissingFileError) as error:
            raise self._bad("missing", f"its shard cannot be read ({error})") from error
        for piece, size, crc, name in zip(pieces, places[:, 1].tolist(), crcs.tolist(), names, strict=True):
            if len(piece) != size:
                raise self._bad("missing", f"{name} is beyond the end of the shard")
            if zlib.crc32(piece) != crc:
                raise self._bad("checksum", f"{name} is not what was stored")
        return pieces

    def _bad(self, reason: Reason, what: str) -> BadSampleError:
        return BadSampleError(self._shard_url, str(self._index.keys[self._sample]), reason, what)

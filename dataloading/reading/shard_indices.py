"""The indices of a set's shards: the small columns of all shards, the tables of a few."""

import os
import threading
from collections import OrderedDict

import numpy as np

from dataloading.reading.fetcher import Fetcher, write_at
from dataloading.reading.shard_cache import Fill, ShardCache
from dataloading.reading.thread_map import ThreadMap
from dataloading.shards.format import (
    Manifest,
    ShardEntry,
    index_name,
    max_shard_index_bytes,
    parse_index,
    parse_index_columns,
    sha256,
)
from dataloading.shards.index import COLUMNS, ShardIndex

MAX_TABLE_BYTES = 2**28  # still tables kept in memory
NUM_READERS = 8


class ShardIndices:
    """Reads and checks every index at the start, several in parallel; parses tables on demand.

    Attributes:
        columns: `keys` and the `COLUMNS` of all shards, concatenated, by name.
        first_positions: int64 (shards + 1,), position of each shard's first video, then the number of videos.

    Raises:
        UserError: an index is missing, is not the one in the manifest, or is invalid.
    """

    def __init__(self, manifest: Manifest, fetcher: Fetcher, cache: ShardCache | None) -> None:
        self._entries = manifest.shards
        self._fetcher = fetcher
        self._cache = cache
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, ShardIndex] = OrderedDict()
        self._num_bytes = 0
        self.first_positions = np.cumsum([0, *(entry.samples for entry in manifest.shards)])
        readers = ThreadMap(min(NUM_READERS, len(manifest.shards)), "indices")
        try:
            parts = readers.map(self._read_columns, manifest.shards)
        finally:
            readers.close()
        self.columns = {name: np.concatenate([part[name] for part in parts]) for name in ("keys", *COLUMNS)}

    def __getitem__(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        entry = self._entries[shard]
        index = parse_index(self._read(entry), entry, self._url(entry))
        with self._lock:
            self._tables[shard] = index
            self._num_bytes += index.num_bytes
            while self._num_bytes > MAX_TABLE_BYTES and len(self._tables) > 1:
                self._num_bytes -= self._tables.popitem(last=False)[1].num_bytes
        return index

    def _read_columns(self, entry: ShardEntry) -> dict[str, np.ndarray]:
        columns = parse_index_columns(self._read(entry), entry, self._url(entry))
        return {name: column.copy() for name, column in columns.items()}  # a view would keep the file's bytes alive

    def _url(self, entry: ShardEntry) -> str:
        return f"{self._fetcher.url}/{index_name(entry.name)}"

    def _read(self, entry: ShardEntry) -> bytes:
        if self._cache is None:
            return self._fetch(entry)
        while True:
            file = self._cache.open(entry.index_sha256, 0, self._fill(entry))
            try:
                data = os.pread(file.descriptor, max_shard_index_bytes(entry) + 1, 0)
                if sha256(data) == entry.index_sha256 or not self._cache.discard(entry.index_sha256, file):
                    return data
            finally:
                file.close()

    def _fill(self, entry: ShardEntry) -> Fill:
        def fill(descriptor: int) -> bool:
            data = self._fetch(entry)
            write_at(descriptor, data, 0)
            return sha256(data) == entry.index_sha256

        return fill

    def _fetch(self, entry: ShardEntry) -> bytes:
        return self._fetcher.small_file(
            index_name(entry.name), max_shard_index_bytes(entry) + 1, lambda data: sha256(data) == entry.index_sha256
        )

"""The indices of a set's shards: the small columns of all of them, the tables of a few."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np

from dataloading.reading.fetcher import Fetcher, write_at
from dataloading.reading.shard_cache import Fill, ShardCache
from dataloading.reading.thread_map import ThreadMap
from dataloading.shards.format import Manifest, ShardEntry, columns_from, index_from, index_name, max_index_size, sha256
from dataloading.shards.index import COLUMNS, ShardIndex

MOST_TABLES = 2**28  # bytes of still tables that are kept in memory
NUM_READERS = 8


class ShardIndices:
    """Every index is read and checked once at the start, several at a time; its tables are parsed when needed.

    Attributes:
        columns: `keys` and the `COLUMNS` of all shards, one after another, by name.
        first_positions: int64 (shards + 1,), position of each shard's first video, and the number of videos.

    Raises:
        UserError: an index is missing, is not the one that the manifest names, or is no index.
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
            parts = readers.map(self._columns_of, manifest.shards)
        finally:
            readers.close()
        self.columns = {name: np.concatenate([part[name] for part in parts]) for name in ("keys", *COLUMNS)}

    def __getitem__(self, shard: int) -> ShardIndex:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        entry = self._entries[shard]
        index = index_from(self._data(entry), entry, self._url(entry))
        with self._lock:
            self._tables[shard] = index
            self._num_bytes += index.num_bytes
            while self._num_bytes > MOST_TABLES and len(self._tables) > 1:
                self._num_bytes -= self._tables.popitem(last=False)[1].num_bytes
        return index

    def _columns_of(self, entry: ShardEntry) -> dict[str, np.ndarray]:
        columns = columns_from(self._data(entry), entry, self._url(entry))
        return {name: column.copy() for name, column in columns.items()}  # the file's bytes need not stay

    def _url(self, entry: ShardEntry) -> str:
        return f"{self._fetcher.url}/{index_name(entry.name)}"

    def _data(self, entry: ShardEntry) -> bytes:
        if self._cache is None:
            return self._fetched(entry)
        while True:
            file = self._cache.open(entry.index_sha256, 0, self._fill(entry))
            try:
                data = os.pread(file.descriptor, max_index_size(entry) + 1, 0)
                if sha256(data) == entry.index_sha256 or not self._cache.discard(entry.index_sha256, file):
                    return data
            finally:
                file.close()

    def _fill(self, entry: ShardEntry) -> Fill:
        def fill(descriptor: int) -> bool:
            data = self._fetched(entry)
            write_at(descriptor, data, 0)
            return sha256(data) == entry.index_sha256

        return fill

    def _fetched(self, entry: ShardEntry) -> bytes:
        return self._fetcher.small_file(
            index_name(entry.name), max_index_size(entry) + 1, lambda data: sha256(data) == entry.index_sha256
        )

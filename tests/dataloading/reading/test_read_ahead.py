from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from dataloading.reading.read_ahead import ReadAhead
from dataloading.reading.shard_set import ShardSet
from dataloading.reading.thread_map import ThreadMap
from mcl_dist.errors import UserError

WriteSet = Callable[..., Path]


class Fetches:
    """Records fetched items, and waits for them."""

    def __init__(self, capacity: int = 100, failing: int | None = None) -> None:
        self.items: list[int] = []
        self._capacity = capacity
        self._failing = failing
        self._changed = threading.Condition()

    def __call__(self, item: int) -> bool:
        with self._changed:
            self.items.append(item)
            self._changed.notify_all()
        if item == self._failing:
            raise UserError("the store is down")
        return len(self.items) < self._capacity

    def wait_for(self, items: set[int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: items <= set(self.items), timeout=30)


def test_expected_items_and_those_that_replace_them_are_fetched() -> None:
    fetches = Fetches()
    ahead = ReadAhead(fetches)
    ahead.expect([3, 1, 2])
    fetches.wait_for({1, 2, 3})
    ahead.expect([4])
    fetches.wait_for({4})
    ahead.close()
    assert sorted(fetches.items) == [1, 2, 3, 4]


def test_prefetching_continues_with_the_next_items_after_a_failure() -> None:
    fetches = Fetches(failing=1)
    ahead = ReadAhead(fetches)
    ahead.expect([1])
    fetches.wait_for({1})
    ahead.expect([2])
    fetches.wait_for({2})
    ahead.close()


def test_expected_shards_are_in_the_cache_when_they_are_read(write_set: WriteSet, tmp_path: Path) -> None:
    folder = write_set([9, 9, 9, 9], per_shard=1)
    fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}", recursive=True)
    shards = ShardSet(f"memory://{tmp_path.name}", str(tmp_path / "cache"))
    shards.expect(range(4))
    never = threading.Event()
    while len(list((tmp_path / "cache").glob("*.tar"))) < 4:
        never.wait(0.001)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    assert [len(shards.read(position).frames([0])) for position in range(4)] == [1] * 4
    counters = shards.counters()
    assert (counters["cache_hits"], counters["cache_misses"]) == (4, 4)
    shards.close()


def test_parallel_calls_return_in_order_and_all_end_before_an_error_is_raised() -> None:
    pool = ThreadMap(4, "calls")
    both = threading.Barrier(2)
    assert pool.map(lambda item: (both.wait(30), item)[1], range(4)) == [0, 1, 2, 3]
    ended: list[int] = []

    def call(item: int) -> None:
        if item == 0:
            raise ValueError("the first")
        ended.append(item)

    with pytest.raises(ValueError, match="the first"):
        pool.map(call, range(8))
    assert sorted(ended) == list(range(1, 8))
    pool.close()
    with pytest.raises(RuntimeError, match="called after close"):
        pool.map(call, [1])

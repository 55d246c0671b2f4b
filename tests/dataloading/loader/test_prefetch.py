from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from dataloading.loader.prefetch import Prefetcher


def test_items_come_in_order_and_end() -> None:
    prefetcher = Prefetcher(range(20), depth=3, name="test")

    assert list(prefetcher) == list(range(20))
    assert list(prefetcher) == []
    prefetcher.close()


def test_at_most_depth_items_are_prefetched() -> None:
    made = []
    made_third = threading.Event()

    def items() -> Iterator[int]:
        for item in itertools.count():
            made.append(item)
            if len(made) == 3:
                made_third.set()
            yield item

    prefetcher = Prefetcher(items(), depth=2, name="test")
    first = next(iter(prefetcher))
    assert made_third.wait(10)
    prefetcher.close()

    assert first == 0
    assert len(made) <= 4


def test_an_error_is_raised_in_the_consumer_after_all_earlier_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    prefetcher = Prefetcher(items(), depth=2, name="test")
    consumer = iter(prefetcher)

    assert next(consumer) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(iter(prefetcher))
    prefetcher.close()


def test_closing_early_leaves_no_thread() -> None:
    before = threading.active_count()

    prefetcher = Prefetcher(itertools.count(), depth=1, name="test")
    assert next(iter(prefetcher)) == 0
    prefetcher.close()
    prefetcher.close()

    assert threading.active_count() == before


def test_the_consumer_calls_while_waiting_until_an_item_is_ready() -> None:
    has_waited = threading.Event()

    def items() -> Iterator[bool]:
        yield has_waited.wait(10)

    prefetcher = Prefetcher(items(), depth=1, name="test", while_waiting=has_waited.set, interval=0.01)
    assert list(prefetcher) == [True]
    prefetcher.close()

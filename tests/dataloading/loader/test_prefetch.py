from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from dataloading.loader.prefetch import Prefetcher


def test_items_come_in_order_and_end() -> None:
    ahead = Prefetcher(range(20), depth=3, name="test")

    assert list(ahead) == list(range(20))
    assert list(ahead) == []
    ahead.close()


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made = []
    made_third = threading.Event()

    def items() -> Iterator[int]:
        for item in itertools.count():
            made.append(item)
            if len(made) == 3:
                made_third.set()
            yield item

    ahead = Prefetcher(items(), depth=2, name="test")
    taken = next(iter(ahead))
    assert made_third.wait(10)
    ahead.close()

    assert taken == 0
    assert len(made) <= 4


def test_an_error_is_raised_where_items_are_taken_after_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = Prefetcher(items(), depth=2, name="test")
    taking = iter(ahead)

    assert next(taking) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(iter(ahead))
    ahead.close()


def test_closing_early_leaves_no_thread() -> None:
    before = threading.active_count()

    ahead = Prefetcher(itertools.count(), depth=1, name="test")
    assert next(iter(ahead)) == 0
    ahead.close()
    ahead.close()

    assert threading.active_count() == before


def test_whoever_waits_for_an_item_does_something_else_now_and_then() -> None:
    has_waited = threading.Event()

    def items() -> Iterator[bool]:
        yield has_waited.wait(10)

    ahead = Prefetcher(items(), depth=1, name="test", meanwhile=has_waited.set, seconds=0.01)
    assert list(ahead) == [True]
    ahead.close()

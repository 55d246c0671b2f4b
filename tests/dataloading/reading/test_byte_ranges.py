from __future__ import annotations

import itertools

import numpy as np
import pytest

from dataloading.reading.byte_ranges import ByteRange, merged


def random_places(seed: int) -> np.ndarray:
    """Pieces of a file with gaps of all sizes, in no order, some of them twice."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    sizes = rng.integers(1, 2000, count)
    gaps = np.where(rng.random(count) < 0.4, 0, rng.integers(0, 3000, count))
    starts = np.cumsum(gaps + np.concatenate([[0], sizes[:-1]]))
    places = np.stack([starts, sizes], axis=1)
    return places[rng.integers(0, count, count)]


def num_wanted(places: np.ndarray) -> int:
    wanted = np.zeros(int(places.sum(axis=1).max()), bool)
    for offset, size in places.tolist():
        wanted[offset : offset + size] = True
    return int(wanted.sum())


@pytest.mark.parametrize("seed", range(50))
def test_ranges_hold_every_piece_once_and_waste_no_more_than_they_may(seed: int) -> None:
    places = random_places(seed)
    ranges = merged(places, waste=0.1)
    assert sorted(itertools.chain(*(one.pieces for one in ranges))) == list(range(len(places)))
    for one in ranges:
        for offset, size in places[list(one.pieces)].tolist():
            assert one.start <= offset
            assert offset + size <= one.end
    assert all(one.end < other.start for one, other in itertools.pairwise(ranges))
    assert sum(one.end - one.start for one in ranges) <= 1.1 * num_wanted(places)


def test_the_smallest_gaps_are_closed_first() -> None:
    places = np.array([(0, 500), (530, 500), (1090, 500), (1600, 500)])
    assert merged(places, waste=0.02) == [ByteRange(0, 1030, (0, 1)), ByteRange(1090, 2100, (2, 3))]
    assert len(merged(places, waste=0.0)) == 4
    assert len(merged(places, waste=1.0)) == 1


def test_pieces_one_after_another_are_one_range() -> None:
    places = np.array([(20, 5), (0, 20), (25, 1)])
    assert merged(places, waste=0.0) == [ByteRange(0, 26, (1, 0, 2))]


def test_nothing_wanted_is_no_range() -> None:
    assert merged(np.zeros((0, 2), np.int64)) == []

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dataloading.reading.byte_ranges import ByteRange, merge_ranges


def random_extents(seed: int) -> np.ndarray:
    """Pieces of a file with gaps of all sizes, in random order, some repeated."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    sizes = rng.integers(1, 2000, count)
    gaps = np.where(rng.random(count) < 0.4, 0, rng.integers(0, 3000, count))
    starts = np.cumsum(gaps + np.concatenate([[0], sizes[:-1]]))
    extents = np.stack([starts, sizes], axis=1)
    return extents[rng.integers(0, count, count)]


def num_wanted(extents: np.ndarray) -> int:
    wanted = np.zeros(int(extents.sum(axis=1).max()), bool)
    for offset, size in extents.tolist():
        wanted[offset : offset + size] = True
    return int(wanted.sum())


@pytest.mark.parametrize("seed", range(50))
def test_ranges_cover_every_piece_once_within_the_allowed_waste(seed: int) -> None:
    extents = random_extents(seed)
    ranges = merge_ranges(extents, waste=0.1)
    assert sorted(itertools.chain(*(each.pieces for each in ranges))) == list(range(len(extents)))
    for each in ranges:
        for offset, size in extents[list(each.pieces)].tolist():
            assert each.start <= offset
            assert offset + size <= each.end
    assert all(each.end < following.start for each, following in itertools.pairwise(ranges))
    assert sum(each.end - each.start for each in ranges) <= 1.1 * num_wanted(extents)


def test_the_smallest_gaps_are_closed_first() -> None:
    extents = np.array([(0, 500), (530, 500), (1090, 500), (1600, 500)])
    assert merge_ranges(extents, waste=0.02) == [ByteRange(0, 1030, (0, 1)), ByteRange(1090, 2100, (2, 3))]
    assert len(merge_ranges(extents, waste=0.0)) == 4
    assert len(merge_ranges(extents, waste=1.0)) == 1


def test_adjacent_pieces_are_one_range() -> None:
    extents = np.array([(20, 5), (0, 20), (25, 1)])
    assert merge_ranges(extents, waste=0.0) == [ByteRange(0, 26, (1, 0, 2))]


def test_no_pieces_are_no_ranges() -> None:
    assert merge_ranges(np.zeros((0, 2), np.int64)) == []

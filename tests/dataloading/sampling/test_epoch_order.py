from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataloading.loader.config import DataConfig
from dataloading.loader.video_source import VideoSource
from dataloading.sampling.epoch_order import EpochOrder, lanes_of_rank, sample_generator
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder


def order_of(num_samples: int = 47, lanes: int = 8, seed: int = 3, shuffle_window: int = 4) -> EpochOrder:
    return EpochOrder(num_samples, lanes=lanes, seed=seed, shuffle_window=shuffle_window)


def epoch_of(order: EpochOrder, epoch: int) -> np.ndarray:
    """The samples of an epoch, (lane_length, lanes)."""
    positions = range(order.lane_length)
    return np.array([[order.sample(epoch, lane, position) for lane in range(order.lanes)] for position in positions])


def test_no_sample_comes_twice_in_an_epoch() -> None:
    order = order_of()

    for epoch in range(10):
        assert len(np.unique(epoch_of(order, epoch))) == order.lane_length * order.lanes


def test_every_sample_is_left_out_equally_often() -> None:
    order = order_of()

    seen = np.bincount(np.concatenate([epoch_of(order, epoch).ravel() for epoch in range(47)]))

    assert seen.tolist() == [40] * 47


def test_the_next_epoch_leaves_out_other_samples() -> None:
    order = order_of()

    left_out = [set(range(47)) - set(epoch_of(order, epoch).ravel()) for epoch in range(2)]

    assert len(left_out[0]) == len(left_out[1]) == 7
    assert not left_out[0] & left_out[1]


def test_a_lane_stays_in_its_part_of_the_set() -> None:
    order = order_of(num_samples=807)

    for epoch in range(5):
        for lane, samples in enumerate(epoch_of(order, epoch).T):
            assert samples.max() - samples.min() <= 101
            assert abs(samples.min() - lane * 807 / 8) <= 2


def test_a_lane_shuffles_within_windows() -> None:
    order = order_of(num_samples=64, lanes=4, shuffle_window=4)

    first, second = epoch_of(order, 0), epoch_of(order, 1)

    assert not np.array_equal(first, second)
    windows = np.arange(64).reshape(4, 4, 4)
    for samples in (first, second):
        assert np.array_equal(np.sort(samples.T.reshape(4, 4, 4), axis=2), windows)


def test_a_sample_does_not_depend_on_the_samples_asked_for_before() -> None:
    expected = [epoch_of(order_of(), epoch) for epoch in range(4)]
    jumping = order_of()

    for epoch, lane, position in ((3, 7, 4), (0, 1, 3), (2, 0, 1), (0, 7, 0)):
        assert jumping.sample(epoch, lane, position) == expected[epoch][position, lane]


def test_finding_a_sample_shuffles_only_its_window() -> None:
    order = order_of(num_samples=10**9, lanes=64, shuffle_window=256)

    start = time.process_time()
    found = [order.sample(epoch, 63, order.lane_length - 1) for epoch in range(100)]

    assert time.process_time() - start < 1
    assert all(10**9 - 64 - 256 <= sample < 10**9 for sample in found)


def test_the_order_depends_on_the_seed() -> None:
    assert not np.array_equal(epoch_of(order_of(seed=1), 0), epoch_of(order_of(seed=2), 0))


def test_ranks_own_the_lanes_in_order() -> None:
    groups = [lanes_of_rank(rank, num_ranks=4, lanes=8) for rank in range(4)]

    assert [lane for lanes in groups for lane in lanes] == list(range(8))


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch\): found 8, must be a multiple .* \(3\)"):
        lanes_of_rank(0, num_ranks=3, lanes=8)


def test_a_set_smaller_than_the_global_batch_is_refused() -> None:
    with pytest.raises(UserError, match="7 usable videos are fewer than the 8 of a global batch"):
        order_of(num_samples=7)


def test_the_error_for_a_small_set_hides_its_credentials(write_set: Callable[..., Path], tmp_path: Path) -> None:
    url = f"memory://user:s3cret@{tmp_path.name}/set"
    for file in write_set([16]).iterdir():
        Folder(url).put(file, file.name)
    config = DataConfig(train=url, cache=str(tmp_path / "cache"), frames=4, stride=2, crop=28)
    with pytest.raises(UserError, match=f"^memory://{tmp_path.name}/set: 1 usable videos are fewer than the 8"):
        VideoSource(config, seed=0, global_batch=8, rank=0, num_ranks=1)


def test_generators_differ_by_seed_epoch_sample_and_attempt() -> None:
    keys = [(1, 2, 3, 0), (1, 2, 4, 0), (1, 3, 3, 0), (2, 2, 3, 0), (1, 2, 3, 1)]

    draws = {key: sample_generator(*key).random(8).tolist() for key in keys}

    assert draws[1, 2, 3, 0] == sample_generator(1, 2, 3).random(8).tolist()
    assert len({tuple(values) for values in draws.values()}) == len(keys)

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dataloading.sampling.mixture import MixedSet, Mixture, Slot
from mcl_dist.errors import ConfigError, UserError

LANES, GLOBAL_BATCH, STEPS = 4, 8, 120
SIZES, WEIGHTS = (37, 11, 19), (3.0, 1.0, 1.5)


def mixture(
    sizes: tuple[int, ...] = SIZES, weights: tuple[float, ...] = WEIGHTS, lanes: int = LANES, seed: int = 5
) -> Mixture:
    """A mixture of sets in which every second sample is usable."""
    first_ids = np.cumsum([0, *(2 * size for size in sizes)])
    sets = [
        MixedSet(2 * np.arange(size), weight, int(first_id), f"set-{size}")
        for size, weight, first_id in zip(sizes, weights, first_ids, strict=False)
    ]
    return Mixture(sets, lanes=lanes, global_batch=GLOBAL_BATCH, seed=seed, shuffle_window=3)


def slots_of_lane(mixed: Mixture, lane: int, steps: int = STEPS) -> list[Slot]:
    return [slot for step in range(steps) for slot in mixed.slots(step, range(lane, lane + 1))]


@pytest.mark.parametrize("lane", range(LANES))
def test_every_stretch_of_a_lane_gives_each_set_its_weight(lane: int) -> None:
    sets = np.array([slot.set_index for slot in slots_of_lane(mixture(), lane)])

    for set_index, weight in enumerate(WEIGHTS):
        taken = np.cumsum(sets == set_index)
        expected = weight / sum(WEIGHTS) * np.arange(1, len(sets) + 1)
        assert np.abs(taken - expected).max() < len(SIZES)


def test_lanes_follow_different_patterns_of_the_sets() -> None:
    patterns = {tuple(slot.set_index for slot in slots_of_lane(mixture(), lane)) for lane in range(LANES)}

    assert len(patterns) == LANES


def test_a_global_batch_holds_the_same_number_of_slots_of_every_lane_in_order() -> None:
    slots = mixture().slots(7, range(LANES))

    assert [slot.lane for slot in slots] == sorted(list(range(LANES)) * (GLOBAL_BATCH // LANES))


def test_the_lanes_of_all_ranks_together_are_the_global_batch() -> None:
    mixed = mixture()

    ranks = [mixed.slots(7, lanes) for lanes in (range(1), range(1, 3), range(3, LANES))]

    assert [slot for slots in ranks for slot in slots] == mixed.slots(7, range(LANES))


def test_slots_and_samples_depend_only_on_the_seed_and_the_step() -> None:
    used = mixture()
    for step in (9, 2):
        used.slots(step, range(LANES))

    slots = mixture().slots(31, range(LANES))

    assert used.slots(31, range(LANES)) == slots
    assert [used.sample_id(slot) for slot in slots] == [mixture().sample_id(slot) for slot in slots]


def test_another_seed_shuffles_the_same_slots() -> None:
    slots = slots_of_lane(mixture(), 0)

    assert slots_of_lane(mixture(seed=6), 0) == slots
    one, other = ([mixed.sample_id(slot) for slot in slots] for mixed in (mixture(), mixture(seed=6)))
    assert one != other


@pytest.mark.parametrize("lane", range(LANES))
def test_each_set_goes_through_its_lane_epoch_by_epoch(lane: int) -> None:
    mixed = mixture()
    slots = slots_of_lane(mixed, lane)

    for set_index, size in enumerate(SIZES):
        own = [slot for slot in slots if slot.set_index == set_index]
        assert mixed.lane_length(own[0]) == size // LANES
        assert [(slot.epoch, slot.position) for slot in own] == [divmod(n, size // LANES) for n in range(len(own))]


def test_no_sample_comes_twice_in_an_epoch_of_its_set() -> None:
    mixed = mixture()
    slots = [slot for lane in range(LANES) for slot in slots_of_lane(mixed, lane)]

    counts = Counter((slot.set_index, slot.epoch, mixed.position(slot)) for slot in slots)

    assert set(counts.values()) == {1}


def test_a_bad_sample_is_replaced_by_the_next_of_its_set_in_the_lane() -> None:
    slot = Slot(set_index=2, epoch=4, lane=1, position=1)

    assert mixture().next_slot(slot) == Slot(2, 4, 1, 2)


def test_the_last_position_of_a_lane_is_replaced_by_the_first_of_the_same_epoch() -> None:
    last = Slot(set_index=1, epoch=4, lane=3, position=SIZES[1] // LANES - 1)

    assert mixture().next_slot(last) == Slot(1, 4, 3, 0)


def test_replacements_reach_every_sample_of_the_lane_before_any_comes_again() -> None:
    mixed = mixture()
    slot = first = Slot(set_index=0, epoch=0, lane=2, position=3)
    positions = []
    for _ in range(mixed.lane_length(first)):
        positions.append(mixed.position(slot))
        slot = mixed.next_slot(slot)

    assert len(set(positions)) == mixed.lane_length(first)
    assert slot == first


def test_sample_ids_count_the_samples_of_all_sets_one_set_after_the_other() -> None:
    mixed = mixture()
    slots = [slot for lane in range(LANES) for slot in slots_of_lane(mixed, lane)]

    for set_index, first_id in enumerate((0, 74, 96)):
        ids = {mixed.sample_id(slot) for slot in slots if slot.set_index == set_index}
        assert ids == {first_id + 2 * sample for sample in range(SIZES[set_index])}


def test_an_epoch_of_the_mixture_is_as_long_as_all_sets_together() -> None:
    mixed = mixture()

    assert mixed.steps_per_epoch == sum(SIZES) // GLOBAL_BATCH
    assert mixed.num_samples(range(1, 3)) == 2 * sum(size // LANES for size in SIZES)


def test_the_epochs_of_a_single_set_are_whole_steps() -> None:
    mixed = mixture((37,), (1.0,))

    assert mixed.steps_per_epoch == 4
    for step in range(12):
        assert {slot.epoch for slot in mixed.slots(step, range(LANES))} == {step // 4}


def test_lanes_that_do_not_divide_the_global_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: found 3, must divide train\.global_batch \(8\)"):
        mixture(lanes=3)


def test_a_set_with_fewer_samples_than_lanes_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^set-3: 3 usable videos are fewer than the 4 of a global batch"):
        mixture((37, 3), (1.0, 1.0))

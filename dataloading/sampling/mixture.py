"""Which sample of which set every slot of a global batch holds, for one set or a weighted mixture of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataloading.sampling.epoch_order import EpochOrder
from mcl_dist.errors import ConfigError

# Phases of the lanes in the pattern of sets: multiples of the golden ratio never bunch up.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class MixedSet:
    """One set of a mixture.

    Attributes:
        usable: positions of its usable samples in the set, int64.
        weight: share of the slots, relative to the other sets' weights.
        first_id: id of its first sample among the samples of all sets.
        name: for messages.
    """

    usable: np.ndarray
    weight: float
    first_id: int
    name: str


class Slot(NamedTuple):
    """The sample of one slot: index of the set, that set's own epoch, lane, and position in the lane."""

    set_index: int
    epoch: int
    lane: int
    position: int


class Mixture:
    """The order of one set, or of several that share every lane's slots by weight, the same for any number of ranks.

    A global batch takes the same number of slots from every lane, one lane after the other. The slots of a lane go to
    the sets in the most even pattern for their weights. Every set has epochs of its own: no sample comes again before
    all others have come, except the few that an epoch leaves out. An epoch of the mixture has as many steps as the
    usable samples of all sets fill.

    Attributes:
        lanes: number of lanes.
        steps_per_epoch: global batches in an epoch.

    Raises:
        UserError: a set has too few samples.
        ConfigError: the lanes do not divide the global batch.
    """

    def __init__(
        self, sets: Sequence[MixedSet], *, lanes: int, global_batch: int, seed: int, shuffle_window: int
    ) -> None:
        if global_batch % lanes:
            raise ConfigError(f"data.lanes: found {lanes}, must divide train.global_batch ({global_batch})")
        self.lanes = lanes
        self._sets = sets
        self._per_step = global_batch // lanes
        self._orders = [
            EpochOrder(
                len(each.usable),
                lanes=lanes,
                seed=seed,
                shuffle_window=shuffle_window,
                # The epochs of a single set are those of the run: whole steps.
                per_step=self._per_step if len(sets) == 1 else 1,
                what=each.name,
            )
            for each in sets
        ]
        self.steps_per_epoch = max(1, sum(len(each.usable) for each in sets) // global_batch)

    def slots(self, step: int, lanes: range) -> list[Slot]:
        """The slots of these lanes in the global batch of `step`, in its order."""
        indices = range(step * self._per_step, (step + 1) * self._per_step)
        return [self._slot(lane, index) for lane in lanes for index in indices]

    def next_slot(self, slot: Slot) -> Slot:
        """The slot whose sample replaces a bad one: the next of its set in the lane."""
        return slot._replace(position=(slot.position + 1) % self.lane_length(slot))

    def lane_length(self, slot: Slot) -> int:
        """Samples of a slot's set in its lane."""
        return self._orders[slot.set_index].lane_length

    def position(self, slot: Slot) -> int:
        """The position in its set of a slot's sample."""
        order = self._orders[slot.set_index]
        return int(self._sets[slot.set_index].usable[order.sample(slot.epoch, slot.lane, slot.position)])

    def sample_id(self, slot: Slot) -> int:
        """The id of a slot's sample among the samples of all sets, one set after the other."""
        return self._sets[slot.set_index].first_id + self.position(slot)

    def num_samples(self, lanes: range) -> int:
        """Samples that these lanes own in an epoch of each set."""
        return sum(order.lane_length for order in self._orders) * len(lanes)

    def _slot(self, lane: int, index: int) -> Slot:
        """The slot at an index of a lane: each set in order takes its part of the indices and leaves the rest.

        A set whose share of the rest is p takes floor((index + 1) p + c) - floor(index p + c) of an index, so the
        number of slots it took before has a closed form.
        """
        phase = lane * _GOLDEN % 1
        remaining_weight = sum(each.weight for each in self._sets)
        for set_index, each in enumerate(self._sets):
            share = each.weight / remaining_weight if set_index < len(self._sets) - 1 else 1.0
            taken = math.floor(index * share + phase)
            if math.floor((index + 1) * share + phase) > taken:
                epoch, position = divmod(taken, self._orders[set_index].lane_length)
                return Slot(set_index, epoch, lane, position)
            index -= taken
            remaining_weight -= each.weight
        raise ValueError(f"index {index} of lane {lane} belongs to no set")

"""Which sample of which set every slot of a global batch holds, when several sets are trained on together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataloading.sampling.epoch_order import EpochOrder
from mcl_dist.errors import ConfigError

# Lanes start the pattern of sets at places that never bunch up: multiples of the golden ratio.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class MixedSet:
    """One set's part: positions of its usable samples in the set, int64; its weight; where its ids begin."""

    usable: np.ndarray
    weight: float
    first_id: int
    name: str


class Slot(NamedTuple):
    """A slot's sample: the set, that set's own epoch, lane and place in the lane."""

    number: int
    epoch: int
    lane: int
    place: int


class Mixture:
    """The order of one set, or of several that share every lane's slots by weight, the same for any number of ranks.

    A global batch takes as many slots of every lane, one lane after the other. Slots of a lane go to the sets in
    the most even pattern of their weights. Every set goes through epochs of its own: none of its samples comes
    again before all but the few that sit out have come. An epoch of the mixture is as many steps as all usable
    samples of all sets fill.

    Attributes:
        lanes: in which the sets are cut.
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
        alone = len(sets) == 1
        self._plans = [
            EpochOrder(
                len(each.usable),
                lanes=lanes,
                seed=seed,
                shuffle_window=shuffle_window,
                # Alone, a set's epochs are those of the run: whole steps.
                per_step=self._per_step if alone else 1,
                what=each.name,
            )
            for each in sets
        ]
        self.steps_per_epoch = max(1, sum(len(each.usable) for each in sets) // global_batch)

    def turns(self, step: int, lanes: range) -> list[Slot]:
        """The slots that these lanes give to the global batch of `step`, in its order."""
        slots = range(step * self._per_step, (step + 1) * self._per_step)
        return [self._turn(lane, slot) for lane in lanes for slot in slots]

    def next_turn(self, turn: Slot) -> Slot:
        """The turn of the sample that stands in for a bad one: the next of its set in the lane."""
        return turn._replace(place=(turn.place + 1) % self.lane_length(turn))

    def lane_length(self, turn: Slot) -> int:
        """Samples of a turn's set in its lane."""
        return self._plans[turn.number].lane_length

    def position(self, turn: Slot) -> int:
        """The position in its set of a turn's sample."""
        plan = self._plans[turn.number]
        return int(self._sets[turn.number].usable[plan.sample(turn.epoch, turn.lane, turn.place)])

    def sample_id(self, turn: Slot) -> int:
        """The number of a turn's sample among those of all sets, one set after the other."""
        return self._sets[turn.number].first_id + self.position(turn)

    def num_samples(self, lanes: range) -> int:
        """Samples that these lanes own in an epoch of each set."""
        return sum(plan.lane_length for plan in self._plans) * len(lanes)

    def _turn(self, lane: int, slot: int) -> Slot:
        """Of every set in turn: does this slot take it, or is it left to the sets after?

        A set whose share of what is left is p takes floor((slot + 1) p + c) - floor(slot p + c) of a slot, so how
        many slots it took before is known without looking at them.
        """
        phase = lane * _GOLDEN % 1
        left = sum(each.weight for each in self._sets)
        for number, each in enumerate(self._sets):
            share = each.weight / left if number < len(self._sets) - 1 else 1.0
            taken = math.floor(slot * share + phase)
            if math.floor((slot + 1) * share + phase) > taken:
                return Slot(number, *self._place(number, lane, taken))
            slot -= taken
            left -= each.weight
        raise ValueError(f"slot {slot} of lane {lane} belongs to no set")

    def _place(self, number: int, lane: int, count: int) -> tuple[int, int, int]:
        epoch, place = divmod(count, self._plans[number].lane_length)
        return epoch, lane, place

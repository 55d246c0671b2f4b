"""Which sample of one set is trained on when: a pure function of seed, epoch, lane and place."""

from __future__ import annotations

import functools

import numpy as np

from mcl_dist.errors import ConfigError, UserError

# Third word of a Philox counter: streams of one (seed, epoch) that must not overlap. A replacement draws from
# the stream after its predecessor's.
_ORDER_STREAM, _SAMPLE_STREAM = 0, 1
_DOUBLES = 4  # that a step of Philox's counter gives


class EpochOrder:
    """The order of N samples in endless epochs, the same for any number of ranks.

    In an epoch every lane owns an equal, contiguous run of samples; the few that would make lanes unequal sit
    out, spread evenly over the set and moving on by one every epoch, so that each sits out equally often and a
    lane hardly moves. A lane is shuffled within windows, so that its reads stay close together. To find a
    sample takes the time of shuffling its window, wherever in the run it is.

    Attributes:
        lane_length: samples of a lane in an epoch, a multiple of `per_step`.

    Raises:
        UserError: fewer samples than a step takes.
    """

    def __init__(
        self, num_samples: int, *, lanes: int, seed: int, shuffle_window: int, per_step: int = 1, what: str = "the set"
    ) -> None:
        if num_samples < lanes * per_step:
            raise UserError(
                f"{what}: {num_samples} usable videos are fewer than the {lanes * per_step} of a global batch; "
                "add videos, or make train.global_batch or data.lanes smaller"
            )
        self.lanes = lanes
        self.lane_length = num_samples // (lanes * per_step) * per_step
        self._num_samples = num_samples
        self._seed = seed
        self._shuffle_window = shuffle_window
        self._sitting_out = functools.lru_cache(maxsize=2)(self._find_sitting_out)
        self._window = functools.lru_cache(maxsize=2 * lanes)(self._shuffle)

    def sample(self, epoch: int, lane: int, place: int) -> int:
        """The sample at a place of a lane, 0 to `lane_length` - 1, in an epoch."""
        number, within = divmod(place, self._shuffle_window)
        return int(self._window(epoch, lane, number)[within])

    def _shuffle(self, epoch: int, lane: int, number: int) -> np.ndarray:
        """int64 (shuffle_window or what is left of the lane,): the samples of a lane's window in order."""
        first = lane * self.lane_length + number * self._shuffle_window
        size = min(self._shuffle_window, (lane + 1) * self.lane_length - first)
        chance = _draws(self._seed, epoch, first, size)
        playing = first + np.argsort(chance, kind="stable")
        # A sample counts those that sit out before it.
        return playing + np.searchsorted(self._sitting_out(epoch), playing, side="right")

    def _find_sitting_out(self, epoch: int) -> np.ndarray:
        """int64 (samples sitting out,), ascending: how many play before each of those that sit out."""
        remainder = self._num_samples - self.lanes * self.lane_length
        spread = np.arange(remainder) * self._num_samples // max(remainder, 1)
        return np.sort((epoch + spread) % self._num_samples) - np.arange(remainder)


def lanes_of_rank(rank: int, *, num_ranks: int, lanes: int) -> range:
    """The contiguous group of lanes that a rank owns for a whole run.

    Raises:
        ConfigError: the ranks do not divide the lanes.
    """
    if lanes % num_ranks:
        raise ConfigError(
            f"data.lanes (default: train.global_batch): found {lanes}, must be a multiple of the number of ranks "
            f"({num_ranks})"
        )
    share = lanes // num_ranks
    return range(rank * share, (rank + 1) * share)


def sample_generator(seed: int, epoch: int, sample: int, attempt: int = 0) -> np.random.Generator:
    """The generator of every random draw of one sample in one epoch: its start, crops, jitter and order.

    `attempt` counts the bad samples that it stands in for: it then looks other than in its own place.
    """
    return np.random.Generator(_philox(seed, epoch, _SAMPLE_STREAM + attempt, sample))


def _draws(seed: int, epoch: int, first: int, count: int) -> np.ndarray:
    """float64 (count,): a part of the endless row of chances of an epoch's order."""
    steps, within = divmod(first, _DOUBLES)
    bits = _philox(seed, epoch, _ORDER_STREAM, 0)
    bits.advance(steps)
    return np.random.Generator(bits).random(within + count)[within:]


def _philox(seed: int, epoch: int, stream: int, item: int) -> np.random.Philox:
    """A counter-based generator: the key and the counter's high words say whose draws they are."""
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, item])

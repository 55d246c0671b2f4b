"""The order of one set's samples: a pure function of seed, epoch, lane and position in the lane."""

import functools

import numpy as np

from mcl_dist.errors import ConfigError, UserError

# Third 64-bit part of a Philox counter: streams of one (seed, epoch) that must not overlap. A replacement draws from
# the stream after its predecessor's.
_ORDER_STREAM, _SAMPLE_STREAM = 0, 1
_DOUBLES = 4  # drawn for each step of Philox's counter


class EpochOrder:
    """The order of N samples in endless epochs, the same for any number of ranks.

    In an epoch every lane owns an equal, contiguous run of samples. The remainder of the division is left out; the
    left-out samples are spread evenly over the set and move on by one every epoch, so each sample is left out equally
    often and a lane's run hardly moves. A lane is shuffled within windows, which keeps its reads close together.
    Finding a sample costs the shuffle of its window, for any epoch and position.

    Attributes:
        lanes: number of lanes.
        lane_length: samples of a lane in an epoch, a multiple of `per_step`.

    Raises:
        UserError: the set has fewer samples than a step needs.
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
        self._ranks_of_left_out = functools.lru_cache(maxsize=2)(self._rank_left_out)
        self._window = functools.lru_cache(maxsize=2 * lanes)(self._shuffle)

    def sample(self, epoch: int, lane: int, position: int) -> int:
        """The sample at a position of a lane, 0 to `lane_length` - 1, in an epoch."""
        window, offset = divmod(position, self._shuffle_window)
        return int(self._window(epoch, lane, window)[offset])

    def _shuffle(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The samples of a lane's window in order, int64 (shuffle_window,); the lane's last window may be shorter."""
        first = lane * self.lane_length + window * self._shuffle_window
        size = min(self._shuffle_window, (lane + 1) * self.lane_length - first)
        sort_keys = _order_draws(self._seed, epoch, first, size)
        included = first + np.argsort(sort_keys, kind="stable")
        # From the rank among included samples to the position in the set: add the left-out samples before it.
        return included + np.searchsorted(self._ranks_of_left_out(epoch), included, side="right")

    def _rank_left_out(self, epoch: int) -> np.ndarray:
        """Number of included samples before each left-out one, int64 (num left out,), ascending."""
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
    lanes_per_rank = lanes // num_ranks
    return range(rank * lanes_per_rank, (rank + 1) * lanes_per_rank)


def sample_generator(seed: int, epoch: int, sample: int, attempt: int = 0) -> np.random.Generator:
    """The generator for all random draws of one sample in one epoch: start, crops, jitter and order.

    `attempt` is the number of bad samples that it replaces: a replacement's draws differ from those of its own slot.
    """
    return np.random.Generator(_philox(seed, epoch, _SAMPLE_STREAM + attempt, sample))


def _order_draws(seed: int, epoch: int, first: int, count: int) -> np.ndarray:
    """Draws `first` to `first + count` of the endless sequence that orders an epoch, float64 (count,)."""
    steps, skip = divmod(first, _DOUBLES)
    bits = _philox(seed, epoch, _ORDER_STREAM, 0)
    bits.advance(steps)
    return np.random.Generator(bits).random(skip + count)[skip:]


def _philox(seed: int, epoch: int, stream: int, item: int) -> np.random.Philox:
    """A counter-based generator, identified by its key and the two high parts of its counter."""
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, item])

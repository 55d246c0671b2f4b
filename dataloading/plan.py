"""Which sample is trained on when: a pure function of seed, epoch, step and lane."""

from __future__ import annotations

import functools

import numpy as np

from mcl_dist.errors import ConfigError, UserError

# Third word of a Philox counter: streams of one (seed, epoch) that must not overlap.
_ORDER_STREAM, _SAMPLE_STREAM = 0, 1


class Plan:
    """The order of N samples in endless epochs, the same for any number of ranks.

    A global batch has one sample of each lane. In an epoch every lane owns an equal, contiguous run of
    samples; the N mod lanes samples that would make lanes unequal sit out, spread evenly over the set and
    moving on by one every epoch, so that each sits out equally often and a lane hardly moves. A lane is
    shuffled within windows, so that its reads stay close together.

    Raises:
        UserError: fewer samples than lanes.
    """

    def __init__(self, num_samples: int, *, lanes: int, seed: int, shuffle_window: int) -> None:
        if num_samples < lanes:
            raise UserError(
                f"{num_samples} usable videos are fewer than the global batch of {lanes}; "
                "add videos or make train.global_batch smaller"
            )
        self.num_samples = num_samples
        self.lanes = lanes
        self.steps_per_epoch = num_samples // lanes
        self._seed = seed
        self._shuffle_window = shuffle_window
        self._epoch_order = functools.lru_cache(maxsize=1)(self._draw_epoch_order)

    def samples(self, step: int, lanes: range) -> np.ndarray:
        """int64 (len(lanes),): the samples that these lanes give to the global batch of `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[lanes.start : lanes.stop, step_of_epoch]

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        """int64 (lanes, steps_per_epoch): every lane's samples of one epoch in order."""
        remainder = self.num_samples % self.lanes
        sitting_out = (epoch + np.arange(remainder) * self.num_samples // max(remainder, 1)) % self.num_samples
        playing = np.delete(np.arange(self.num_samples), sitting_out).reshape(self.lanes, -1)
        windows = np.arange(self.steps_per_epoch) // self._shuffle_window
        chance = _generator(self._seed, epoch, _ORDER_STREAM, 0).random(playing.shape)
        # Windows are whole numbers and chance is below one: the sum sorts by window, then by chance.
        return np.take_along_axis(playing, np.argsort(windows + chance, axis=1, kind="stable"), axis=1)


def lanes_of_rank(rank: int, *, num_ranks: int, lanes: int) -> range:
    """The contiguous group of lanes that a rank owns for a whole run.

    Raises:
        ConfigError: the ranks do not divide the lanes.
    """
    if lanes % num_ranks:
        raise ConfigError(f"train.global_batch: found {lanes}, must be a multiple of the number of ranks ({num_ranks})")
    share = lanes // num_ranks
    return range(rank * share, (rank + 1) * share)


def sample_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of every random draw of one sample in one epoch: its start, crops, jitter and order."""
    return _generator(seed, epoch, _SAMPLE_STREAM, sample)


def _generator(seed: int, epoch: int, stream: int, item: int) -> np.random.Generator:
    """A counter-based generator: the key and the counter's high words say whose draws they are."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, item]))

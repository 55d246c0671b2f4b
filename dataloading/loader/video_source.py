"""What a step's videos are, read and drawn but not yet decoded: no pixel is touched here."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataloading.loader.augment import Augmentation, draw_augmentation
from dataloading.loader.config import DataConfig, LabelledConfig, SetConfig
from dataloading.reading.shard_set import ShardSet, StoredVideo
from dataloading.sampling.epoch_order import lanes_of_rank, sample_generator
from dataloading.sampling.mixture import MixedSet, Mixture, Slot
from dataloading.sampling.tubelets import Box, CutConfig, Tubelet, draw_clip, draw_tubelets
from dataloading.shards.bad_sample import BadSampleError
from mcl_dist.batch import QUERY
from mcl_dist.errors import UserError
from mcl_dist.storage.store_requests import without_credentials

# Steps whose samples storage is told of in advance.
STEPS_EXPECTED = 32
# Videos read side by side where every read is a request.
READERS = 8


@dataclass(frozen=True)
class EncodedVideo:
    """One video of a batch and all that chance decides of it, with the stills that its views need.

    Attributes:
        turn: whose slot it fills; `attempt` counts the bad samples before it in that slot.
        sample: its number among the samples of all sets.
        where: URL of the shard and key, for messages.
        label: of the clips' order, or the video's class.
        looks: of the V views.
        frames: encoded stills, uint8 (bytes,), each once.
        frame_of, windows: of each of the V T frames of the views, the still and what is cut of it (4,).
        flow: encoded stills of the query's flow, T of them; none where there is no target to make.
        flow_windows: (2, 4), where the two components' parts lie in each.
    """

    turn: Slot
    attempt: int
    sample: int
    where: str
    label: int
    looks: tuple[Augmentation, ...]
    frames: list[np.ndarray]
    frame_of: np.ndarray
    windows: np.ndarray
    flow: list[np.ndarray]
    flow_windows: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """float32 (V, 4): top, left, height, width of what each view shows, all its frames alike."""
        return self.windows.reshape(len(self.looks), -1, 4)[:, 0].astype(np.float32)

    def undecodable(self, what: str) -> BadSampleError:
        """The error that says so of this video."""
        shard, _, key = self.where.rpartition(", video ")
        return BadSampleError(shard, key, "decode", what)


@dataclass(frozen=True)
class _OpenSet:
    """A set, how clips are cut from it, and which of its samples are used."""

    stored: ShardSet
    cut: CutConfig
    usable: np.ndarray
    name: str


class VideoSource:
    """One rank's videos of any step, drawn as tubelets or, with a `LabelledConfig`, as one clip with its class.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        num_left_out: videos of the sets that are too short.
        num_samples: samples that this rank's lanes own.
        bad_allowed: how many of them may be bad.

    Raises:
        UserError: a set cannot be read, or has too few usable videos.
        ConfigError: ranks do not divide the lanes, lanes not the global batch, or a set does not store the frames
            that the stride asks for.
    """

    def __init__(
        self, config: DataConfig | LabelledConfig, *, seed: int, global_batch: int, rank: int, num_ranks: int
    ) -> None:
        lanes = config.lanes or global_batch
        self._config = config
        self._seed = seed
        self._lanes = lanes_of_rank(rank, num_ranks=num_ranks, lanes=lanes)
        self._sets = [self._opened(each) for each in config.all_sets]
        self._first_ids: list[int] = np.cumsum([0] + [len(each.stored) for each in self._sets[:-1]]).tolist()
        self._mixture = Mixture(
            [
                MixedSet(each.usable, given.weight, first, each.name)
                for each, given, first in zip(self._sets, config.all_sets, self._first_ids, strict=True)
            ],
            lanes=lanes,
            global_batch=global_batch,
            seed=seed,
            shuffle_window=config.shuffle_window,
        )
        self.steps_per_epoch = self._mixture.steps_per_epoch
        self.num_left_out = sum(len(each.stored) - len(each.usable) for each in self._sets)
        self.num_samples = self._mixture.num_samples(self._lanes)
        self.bad_allowed = math.ceil(config.max_bad_fraction * self.num_samples)
        self._turns = functools.lru_cache(maxsize=2 * STEPS_EXPECTED)(self._turns_of)
        self._readers = ThreadPoolExecutor(READERS, "reader") if config.fetch == "ranges" else None

    def videos(self, step: int) -> tuple[list[EncodedVideo], list[BadSampleError]]:
        """This rank's videos of the global batch of `step`, and the bad samples that some of them stand in for.

        Raises:
            UserError: storage cannot be used, or more samples in a row are bad than may be.
        """
        self._announce(step)
        turns = [turn for turn, _ in self._turns(step)]
        found = map(self._first_good, turns) if self._readers is None else self._readers.map(self._first_good, turns)
        videos, errors = zip(*found, strict=True)
        return list(videos), [error for each in errors for error in each]

    def stand_in(self, video: EncodedVideo, error: BadSampleError) -> tuple[EncodedVideo, list[BadSampleError]]:
        """What comes instead of a video that turned out to be bad, and the bad samples between."""
        return self._first_good(*self._next(video.turn, video.attempt, error))

    def name_of(self, sample: int) -> str:
        """URL of the shard and key of a sample among those of all sets."""
        number = int(np.searchsorted(self._first_ids, sample, side="right")) - 1
        return self._sets[number].stored.name_of(sample - self._first_ids[number])

    def counters(self) -> dict[str, Any]:
        """What reading has taken so far, all sets together; see `ShardSet.counters`."""
        return functools.reduce(added, (each.stored.counters() for each in self._sets))

    def close(self) -> None:
        """End what goes on in the background."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        for each in self._sets:
            each.stored.close()

    def _opened(self, given: SetConfig) -> _OpenSet:
        config = self._config
        is_labelled = isinstance(config, LabelledConfig)
        stored = ShardSet(given.url, config.cache, config)
        cut = config.cut(stored.stored_stride(config.stride, key="clips.stride" if is_labelled else "data.stride"))
        # A classifier sees short videos, too: they are repeated.
        least = 1 if isinstance(config, LabelledConfig) else config.min_windows * cut.window
        return _OpenSet(stored, cut, np.flatnonzero(stored.num_frames >= least), without_credentials(given.url))

    def _turns_of(self, step: int) -> list[tuple[Slot, int]]:
        """The turns of a step, each with its position in its set."""
        return [(turn, self._mixture.position(turn)) for turn in self._mixture.turns(step, self._lanes)]

    def _announce(self, step: int) -> None:
        """Tell storage what will be read from here on."""
        coming = [turn for later in range(step, step + STEPS_EXPECTED) for turn in self._turns(later)]
        for number, each in enumerate(self._sets):
            each.stored.expect([position for turn, position in coming if turn.number == number])

    def _first_good(self, turn: Slot, attempt: int = 0) -> tuple[EncodedVideo, list[BadSampleError]]:
        """The turn's video or, where its sample is bad, the next of its lane that is good."""
        bad: list[BadSampleError] = []
        while isinstance(read := self._try(turn, attempt), BadSampleError):
            bad.append(read)
            turn, attempt = self._next(turn, attempt, read)
        return read, bad

    def _next(self, turn: Slot, attempt: int, error: BadSampleError) -> tuple[Slot, int]:
        """The turn after one whose sample is bad; as many bad ones in a row as there may be at all are too many."""
        if attempt + 1 > min(self.bad_allowed, self._mixture.lane_length(turn) - 1):
            raise too_many_bad(self._config.max_bad_fraction, self.num_samples, error)
        return self._mixture.next_turn(turn), attempt + 1

    def _try(self, turn: Slot, attempt: int) -> EncodedVideo | BadSampleError:
        try:
            return self._read(turn, attempt)
        except BadSampleError as error:
            return error

    def _read(self, turn: Slot, attempt: int) -> EncodedVideo:
        """Read what the draws look at, draw, and read the stills that they ask for."""
        source, position = self._sets[turn.number], self._mixture.position(turn)
        video = source.stored.read(position)
        sample = self._mixture.sample_id(turn)
        rng = sample_generator(self._seed, turn.epoch, sample, attempt)
        is_labelled = isinstance(self._config, LabelledConfig)
        label, tubelets = _labelled(rng, source, video, position) if is_labelled else _ordered(rng, source, video)
        looks = tuple(draw_augmentation(rng, self._config.augment) for _ in tubelets)
        # Query and first key share their frames, and clips may overlap.
        wanted = np.concatenate([tubelet.frames for tubelet in tubelets])
        needed, frame_of = np.unique(wanted, return_inverse=True)
        query: Tubelet = tubelets[QUERY]
        return EncodedVideo(
            turn=turn,
            attempt=attempt,
            sample=sample,
            where=video.where,
            label=label,
            looks=looks,
            frames=video.frames(needed),
            frame_of=frame_of,
            windows=np.repeat(np.array([tubelet.box for tubelet in tubelets], np.float64), self._config.frames, axis=0),
            flow=[] if is_labelled else video.flow(query.frames),
            flow_windows=flow_windows(query.box, video),
        )


def _ordered(rng: np.random.Generator, source: _OpenSet, video: StoredVideo) -> tuple[int, tuple[Tubelet, ...]]:
    """The order label and the four views of a video; `UserError` when its clip scores are of other windows."""
    _check_window(video, source)
    return draw_tubelets(
        rng,
        source.cut,
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        height=video.height,
        width=video.width,
    )


def _labelled(
    rng: np.random.Generator, source: _OpenSet, video: StoredVideo, position: int
) -> tuple[int, tuple[Tubelet, ...]]:
    """The class and the one view of the video at a position of its set."""
    clip = draw_clip(rng, source.cut, num_frames=video.num_frames, height=video.height, width=video.width)
    return int(source.stored.labels[position]), (clip,)


def flow_windows(box: Box, video: StoredVideo) -> np.ndarray:
    """Where a frame's part lies in its flow still, float64 (2, 4): top, left, height, width of the horizontal
    component and of the vertical one below it, in fractions of flow pixels.
    """
    down, across = video.flow_height / video.height, video.flow_width / video.width
    top, left, height, width = box.top * down, box.left * across, box.height * down, box.width * across
    return np.array([(top, left, height, width), (video.flow_height + top, left, height, width)])


def too_many_bad(max_fraction: float, num_samples: int, last: BadSampleError | str) -> UserError:
    """The error that ends a run whose budget of bad samples is spent."""
    return UserError(
        f"more bad samples than data.max_bad_fraction={max_fraction} allows of this rank's {num_samples}; "
        f"the last: {last}"
    )


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two trees of counts, their leaves added."""
    total = dict(one)
    for name, value in other.items():
        if isinstance(value, dict):
            total[name] = added(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def _check_window(video: StoredVideo, source: _OpenSet) -> None:
    stored = video.num_frames - len(video.clip_scores) + 1
    if stored != source.cut.window:
        keep_every = source.stored.keep_every
        window = source.cut.window * keep_every
        raise UserError(
            f"{video.where}: its clip scores are of windows of {stored * keep_every} frames, data.frames x "
            f"data.stride is {window}; build the set with `mcl shards build … --window {window}`"
        )

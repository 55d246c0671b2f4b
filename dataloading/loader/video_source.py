"""The videos of a step, read and drawn but not decoded: no pixel is touched here."""

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

READ_AHEAD_STEPS = 32
NUM_READERS = 8  # concurrent reads, where every read is a request


@dataclass(frozen=True)
class EncodedVideo:
    """One video of a batch: all its random draws, and the encoded stills of its views.

    Attributes:
        slot: that it fills.
        attempt: number of bad samples before it in that slot.
        sample: id among the samples of all sets.
        where: URL of the shard and key, for messages.
        label: order of the clips, or class of the video.
        augmentations: of the V views.
        frames: encoded stills without repetition, uint8 (bytes,) each.
        frame_index: of each of the V T frames of the views, the index of its still.
        windows: of each of the V T frames of the views, its window of the still, (4,).
        flow: encoded stills of the query's flow, T of them; none without a motion target.
        flow_windows: (2, 4), the windows of the two components in each flow still.
    """

    slot: Slot
    attempt: int
    sample: int
    where: str
    label: int
    augmentations: tuple[Augmentation, ...]
    frames: list[np.ndarray]
    frame_index: np.ndarray
    windows: np.ndarray
    flow: list[np.ndarray]
    flow_windows: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """Top, left, height, width of each view's window, the same for all its frames; float32 (V, 4)."""
        return self.windows.reshape(len(self.augmentations), -1, 4)[:, 0].astype(np.float32)

    def decode_error(self, what: str) -> BadSampleError:
        """The error for a still of this video that the decoder refuses."""
        shard, _, key = self.where.rpartition(", video ")
        return BadSampleError(shard, key, "decode", what)


@dataclass(frozen=True)
class _OpenSet:
    """A set, how clips are cut from it, positions of its usable samples, and its name for messages."""

    stored: ShardSet
    cut: CutConfig
    usable: np.ndarray
    name: str


class VideoSource:
    """One rank's videos of any step, drawn as tubelets or, with a `LabelledConfig`, as one clip with its class.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        num_left_out: videos of the sets that are too short.
        num_samples: samples in this rank's lanes.
        bad_allowed: number of them that may be bad.

    Raises:
        UserError: a set cannot be read, or has too few usable videos.
        ConfigError: the ranks do not divide the lanes, the lanes not the global batch, or a set does not store the
            frames that the stride needs.
    """

    def __init__(
        self, config: DataConfig | LabelledConfig, *, seed: int, global_batch: int, rank: int, num_ranks: int
    ) -> None:
        lanes = config.lanes or global_batch
        self._config = config
        self._seed = seed
        self._lanes = lanes_of_rank(rank, num_ranks=num_ranks, lanes=lanes)
        self._sets = [self._open(each) for each in config.all_sets]
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
        self._slots = functools.lru_cache(maxsize=2 * READ_AHEAD_STEPS)(self._slots_with_positions)
        self._readers = ThreadPoolExecutor(NUM_READERS, "reader") if config.fetch == "ranges" else None

    def videos(self, step: int) -> tuple[list[EncodedVideo], list[BadSampleError]]:
        """This rank's videos of the global batch of `step`, and the bad samples that were replaced.

        Raises:
            UserError: storage fails, or more samples in a row are bad than the budget allows.
        """
        self._announce_reads(step)
        slots = [slot for slot, _ in self._slots(step)]
        read = map(self._first_good, slots) if self._readers is None else self._readers.map(self._first_good, slots)
        videos, errors = zip(*read, strict=True)
        return list(videos), [error for each in errors for error in each]

    def replacement(self, video: EncodedVideo, error: BadSampleError) -> tuple[EncodedVideo, list[BadSampleError]]:
        """The video that replaces a bad one, and the bad samples between the two."""
        return self._first_good(*self._next(video.slot, video.attempt, error))

    def name_of(self, sample: int) -> str:
        """URL of the shard and key of a sample, given its id among the samples of all sets."""
        set_index = int(np.searchsorted(self._first_ids, sample, side="right")) - 1
        return self._sets[set_index].stored.name_of(sample - self._first_ids[set_index])

    def counters(self) -> dict[str, Any]:
        """Counts of all reads so far, summed over the sets; see `ShardSet.counters`."""
        return functools.reduce(sum_counts, (each.stored.counters() for each in self._sets))

    def close(self) -> None:
        """Stop all background work."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        for each in self._sets:
            each.stored.close()

    def _open(self, given: SetConfig) -> _OpenSet:
        config = self._config
        is_labelled = isinstance(config, LabelledConfig)
        stored = ShardSet(given.url, config.cache, config)
        cut = config.cut(stored.stored_stride(config.stride, key="clips.stride" if is_labelled else "data.stride"))
        # A classifier is trained on short videos, too: they are stretched.
        min_frames = 1 if isinstance(config, LabelledConfig) else config.min_windows * cut.window
        return _OpenSet(stored, cut, np.flatnonzero(stored.num_frames >= min_frames), without_credentials(given.url))

    def _slots_with_positions(self, step: int) -> list[tuple[Slot, int]]:
        """The slots of a step, each with the position of its sample in its set."""
        return [(slot, self._mixture.position(slot)) for slot in self._mixture.slots(step, self._lanes)]

    def _announce_reads(self, step: int) -> None:
        """Announce the reads from this step on to the sets."""
        coming = [slot for later in range(step, step + READ_AHEAD_STEPS) for slot in self._slots(later)]
        for set_index, each in enumerate(self._sets):
            each.stored.expect([position for slot, position in coming if slot.set_index == set_index])

    def _first_good(self, slot: Slot, attempt: int = 0) -> tuple[EncodedVideo, list[BadSampleError]]:
        """The slot's video or, if its sample is bad, the next good one of its lane; and the bad samples."""
        bad: list[BadSampleError] = []
        while isinstance(read := self._try(slot, attempt), BadSampleError):
            bad.append(read)
            slot, attempt = self._next(slot, attempt, read)
        return read, bad

    def _next(self, slot: Slot, attempt: int, error: BadSampleError) -> tuple[Slot, int]:
        """The slot after one with a bad sample; the whole budget limits bad samples in a row, too."""
        if attempt + 1 > min(self.bad_allowed, self._mixture.lane_length(slot) - 1):
            raise bad_sample_budget_error(self._config.max_bad_fraction, self.num_samples, error)
        return self._mixture.next_slot(slot), attempt + 1

    def _try(self, slot: Slot, attempt: int) -> EncodedVideo | BadSampleError:
        try:
            return self._read(slot, attempt)
        except BadSampleError as error:
            return error

    def _read(self, slot: Slot, attempt: int) -> EncodedVideo:
        """Read a video's motion, draw its views, and read the stills of the views."""
        source, position = self._sets[slot.set_index], self._mixture.position(slot)
        video = source.stored.read(position)
        sample = self._mixture.sample_id(slot)
        rng = sample_generator(self._seed, slot.epoch, sample, attempt)
        is_labelled = isinstance(self._config, LabelledConfig)
        draw = _draw_labelled_clip if is_labelled else _draw_ordered_views
        label, tubelets = draw(rng, source, video, position)
        augmentations = tuple(draw_augmentation(rng, self._config.augment) for _ in tubelets)
        # Query and first key share their frames, and clips may overlap.
        frames, frame_index = np.unique(np.concatenate([each.frames for each in tubelets]), return_inverse=True)
        query: Tubelet = tubelets[QUERY]
        return EncodedVideo(
            slot=slot,
            attempt=attempt,
            sample=sample,
            where=video.where,
            label=label,
            augmentations=augmentations,
            frames=video.frames(frames),
            frame_index=frame_index,
            windows=np.repeat(np.array([each.box for each in tubelets], np.float64), self._config.frames, axis=0),
            flow=[] if is_labelled else video.flow(query.frames),
            flow_windows=flow_windows(query.box, video),
        )


def flow_windows(box: Box, video: StoredVideo) -> np.ndarray:
    """The windows of a frame's box in its flow still, float64 (2, 4): top, left, height, width of the horizontal
    component and of the vertical one below it, in fractions of flow pixels.
    """
    down, across = video.flow_height / video.height, video.flow_width / video.width
    top, left, height, width = box.top * down, box.left * across, box.height * down, box.width * across
    return np.array([(top, left, height, width), (video.flow_height + top, left, height, width)])


def bad_sample_budget_error(max_fraction: float, num_samples: int, last: BadSampleError | str) -> UserError:
    """The error that ends a run with too many bad samples."""
    return UserError(
        f"more bad samples than data.max_bad_fraction={max_fraction} allows of this rank's {num_samples}; "
        f"the last: {last}"
    )


def sum_counts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two trees of counts, added leaf by leaf."""
    total = dict(one)
    for name, value in other.items():
        if isinstance(value, dict):
            total[name] = sum_counts(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def _draw_ordered_views(
    rng: np.random.Generator, source: _OpenSet, video: StoredVideo, _position: int
) -> tuple[int, tuple[Tubelet, ...]]:
    """The order label and the four views of a video.

    Raises:
        UserError: the clip scores have another window.
    """
    _check_window(video, source)
    return draw_tubelets(
        rng,
        source.cut,
        frame_maps=video.frame_maps,
        clip_scores=video.clip_scores,
        height=video.height,
        width=video.width,
    )


def _draw_labelled_clip(
    rng: np.random.Generator, source: _OpenSet, video: StoredVideo, position: int
) -> tuple[int, tuple[Tubelet, ...]]:
    """The class and the only view of the video at a position of its set."""
    clip = draw_clip(rng, source.cut, num_frames=video.num_frames, height=video.height, width=video.width)
    return int(source.stored.labels[position]), (clip,)


def _check_window(video: StoredVideo, source: _OpenSet) -> None:
    stored = video.num_frames - len(video.clip_scores) + 1
    if stored != source.cut.window:
        keep_every = source.stored.keep_every
        window = source.cut.window * keep_every
        raise UserError(
            f"{video.where}: found clip scores for windows of {stored * keep_every} frames, data.frames x data.stride "
            f"is {window}; build the set with `mcl shards build … --window {window}`"
        )

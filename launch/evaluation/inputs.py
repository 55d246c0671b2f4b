"""Inputs of the protocols: a checked pair of shard sets, and their clips."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice

import numpy as np
import torch

from dataloading.build.local_executor import num_cores
from dataloading.loader.config import ReadingConfig
from dataloading.loader.probe_clips import ClipGeometry, ClipsConfig, ProbeClips
from dataloading.reading.shard_set import ShardSet
from dataloading.videos.video_lists import UNLABELLED
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError

RECALIBRATION_BATCHES = 20
RECALIBRATION_VIDEOS = 32  # per batch, as in small pre-training runs


@contextmanager
def open_split(
    train_url: str, test_url: str, data: ReadingConfig, group: ProcessGroup
) -> Iterator[tuple[ShardSet, ShardSet]]:
    """Open a training and a test set, and check that they fit; errors as in `check_split`, or of storage."""
    with ExitStack() as stack:
        train, test = (stack.enter_context(closing(ShardSet(url, data.cache, data))) for url in (train_url, test_url))
        check_split(train_url, train, test_url, test, warn=group.is_first)
        yield train, test


def check_split(train_url: str, train: ShardSet, test_url: str, test: ShardSet, *, warn: bool) -> None:
    """Check that a probe can be trained on one set and tested on the other.

    A class without a test video is left out of the mean over classes; `warn` prints a warning.

    Raises:
        UserError: a set has no labels, the sets' classes differ, or a class has no training video.
    """
    for url, shard_set in ((train_url, train), (test_url, test)):
        if UNLABELLED in shard_set.manifest.classes:
            raise UserError(
                f"{url}: has videos without a label (class `{UNLABELLED}`); build it from class folders, or from a "
                "list that has labels"
            )
    check_classes(train_url, train.manifest.classes, test_url, test.manifest.classes)
    if empty := _empty_classes(train):
        raise UserError(
            f"{train_url}: class `{empty[0]}` has no training video; add one, or remove the class from both sets"
        )
    for name in _empty_classes(test) if warn else ():
        print(f"mcl: {test_url}: class `{name}` has no video; the mean over classes leaves it out", file=sys.stderr)


def check_classes(train_url: str, train: tuple[str, ...], test_url: str, test: tuple[str, ...]) -> None:
    """Raise UserError unless two sets have the same classes in the same order: labels are indices of classes."""
    if train == test:
        return
    unmatched = sorted(set(train) ^ set(test))
    example = f"only one set has `{unmatched[0]}`" if unmatched else "the order differs"
    raise UserError(
        f"{test_url}: its {len(test)} classes are not the {len(train)} of {train_url} ({example}); "
        "build both from folders with the same class names"
    )


def _empty_classes(shard_set: ShardSet) -> list[str]:
    counts = np.bincount(shard_set.labels, minlength=len(shard_set.manifest.classes))
    return [name for name, count in zip(shard_set.manifest.classes, counts, strict=True) if not count]


def rank_clips(
    shard_set: ShardSet, geometry: ClipGeometry, group: ProcessGroup, data: ReadingConfig, clips: ClipsConfig
) -> ProbeClips:
    """The configured clips of this rank's share of a set."""
    return ProbeClips.for_rank(
        shard_set, geometry, group, data, threads=num_threads(), num_clips=clips.count, num_crops=clips.crops
    )


def recalibration_clips(
    train: ShardSet, geometry: ClipGeometry, data: ReadingConfig, group: ProcessGroup
) -> Iterator[torch.Tensor]:
    """Batches of clips uint8 (V, T, H, W, 3), one clip of each of the set's first videos.

    A set's order is random, so its first videos are an unbiased sample.
    """
    batches = ProbeClips.for_rank(
        train,
        geometry,
        group,
        data,
        threads=num_threads(),
        num_clips=1,
        positions=range(len(train)),
        batch_videos=RECALIBRATION_VIDEOS,
    )
    for batch in islice(batches, RECALIBRATION_BATCHES):
        yield batch.clips[:, 0]


def num_threads() -> int:
    """Decoding threads of this rank: the machine's cores divided by its ranks."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_SIZE", "1")))

"""Protocols on frozen features: both sets through the encoder, over all ranks, then a probe on the first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from dataloading.build.local_executor import num_cores
from dataloading.loader.config import ReadingConfig
from dataloading.loader.probe_clips import ClipGeometry, ProbeClips
from dataloading.reading.shard_set import ShardSet
from dataloading.videos.video_lists import UNLABELLED
from launch.evaluation.config import FrozenConfig, KnnEvaluation, SvmEvaluation
from launch.evaluation.encoder_under_test import EncoderUnderTest
from launch.terminal.progress import watched
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import RankError, UserError
from mcl_dist.evaluation.feature_cache import FeatureCache, digest_of
from mcl_dist.evaluation.features import (
    Features,
    check_finite,
    extract_features,
    gather_features,
    recalibrate,
    share_of,
)
from mcl_dist.evaluation.knn import knn_answers, neighbours_to_show, retrieval_answers
from mcl_dist.evaluation.metrics import Answers, Scores, score
from mcl_dist.evaluation.svm import svm_answers
from mcl_dist.model.encoder import Encoder

RECALIBRATION_BATCHES = 20
RECALIBRATION_VIDEOS = 32  # a batch: as many as small pre-training runs use


def evaluate_frozen(
    subject: EncoderUnderTest, train_url: str, test_url: str, config: FrozenConfig, group: ProcessGroup | None = None
) -> Scores | None:
    """Features of both sets, a probe on the one, its scores on the other (METHOD.md, section 6); on the first rank.

    Raises:
        UserError: a set cannot be read, has no labels, or other classes than the other; or a class to learn from has
            no video.
        ConfigError: a set does not store the frames that the stride asks for.
    """
    group = group or ProcessGroup(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with ExitStack() as opened:
        train, test = (
            opened.enter_context(closing(ShardSet(url, config.data.cache, config.data)))
            for url in (train_url, test_url)
        )
        check_split(train_url, train, test_url, test, told=group.is_first)
        encoder = subject.encoder.to(group.device)
        geometry = subject.shown(config.clips)
        if subject.is_untrained if config.recalibrate is None else config.recalibrate:
            recalibrate(encoder, recalibration_clips(train, geometry, config.data, group))
        features = [
            _features(encoder, shard_set, geometry, config, group, what)
            for shard_set, what in ((train, "training features"), (test, "test features"))
        ]
        names = train.manifest.classes
    if not group.is_first:
        return None
    scores = score(_answers(features[0], features[1], len(names), config), names, config.bootstrap)
    return replace(scores, neighbours=neighbours_to_show(*features))


def check_split(train_url: str, train: ShardSet, test_url: str, test: ShardSet, *, told: bool) -> None:
    """Whether a probe can learn from the one set and be tested on the other.

    A class without a test video is told, where this rank is to, and left out of the mean over classes.

    Raises:
        UserError: a set has no labels, the sets' classes differ, or a class to learn has no video.
    """
    for url, shard_set in ((train_url, train), (test_url, test)):
        if UNLABELLED in shard_set.manifest.classes:
            raise UserError(
                f"{url}: has videos without a label (class `{UNLABELLED}`); build it from class folders, or from a "
                "list that has labels"
            )
    check_classes(train_url, train.manifest.classes, test_url, test.manifest.classes)
    for url, shard_set in ((train_url, train), (test_url, test)):
        for name in _empty_classes(shard_set):
            what = f"{url}: class `{name}` has no video"
            if shard_set is train:
                raise UserError(f"{what}, so nothing can learn it; add one, or leave the class out of both sets")
            if told:
                print(f"mcl: {what}; the mean over classes leaves it out", file=sys.stderr)


def check_classes(train_url: str, train: tuple[str, ...], test_url: str, test: tuple[str, ...]) -> None:
    """Labels count a set's own classes: two sets can only be compared when they have the same.

    Raises:
        UserError: naming a class that one of them lacks.
    """
    if train == test:
        return
    alone = sorted(set(train) ^ set(test))
    example = f"`{alone[0]}` is in one alone" if alone else "in another order"
    raise UserError(
        f"{test_url}: its {len(test)} classes are not the {len(train)} of {train_url} ({example}); "
        "build both from folders with the same class names"
    )


def _empty_classes(shard_set: ShardSet) -> list[str]:
    counts = np.bincount(shard_set.labels, minlength=len(shard_set.manifest.classes))
    return [name for name, count in zip(shard_set.manifest.classes, counts, strict=True) if not count]


def _features(
    encoder: Encoder, shard_set: ShardSet, geometry: ClipGeometry, config: FrozenConfig, group: ProcessGroup, what: str
) -> Features:
    """A set's features, on the first rank at least; all ranks must ask together."""
    cache = FeatureCache(config.features)
    made_of: dict[str, Any] = {
        "encoder": {"sha256": digest_of(encoder), **asdict(encoder.config)},
        "set": shard_set.manifest.digest,
        "clips": {**asdict(geometry), "count": config.clips.count, "crops": config.clips.crops},
    }
    kept, line = cache.read(made_of) if group.is_first else (None, "")
    if group.is_first and line:
        print(f"{what} of {len(shard_set)} videos: {line}", file=sys.stderr)
    if group.from_first(int(kept is not None)):
        return kept or Features(np.empty((0, encoder.feature_dim), np.float32), np.empty(0, np.int64))
    batches = ProbeClips(
        shard_set,
        geometry,
        device=group.device,
        decoder_device=config.data.decoder_device(group.device),
        num_clips=config.clips.count,
        num_crops=config.clips.crops,
        positions=share_of(len(shard_set), group),
        batch_videos=1,
        threads=num_threads(),
    )
    told = watched(batches, len(batches), f"{what} of {len(shard_set)} videos") if group.is_first else batches
    with told_by(group):
        own = extract_features(encoder, ((batch.clips, batch.labels) for batch in told))
        check_finite(own, batches.name_of)
    features = gather_features(own, len(shard_set), group)
    if group.is_first and (line := cache.write(made_of, features)):
        print(f"{what}: {line}", file=sys.stderr)
    return features


@contextmanager
def told_by(group: ProcessGroup) -> Iterator[None]:
    """What is met in here one rank alone has met: no other reads what it reads."""
    try:
        yield
    except UserError as error:
        raise RankError(f"rank {group.rank}: {error}" if group.size > 1 else str(error)) from error


def recalibration_clips(
    train: ShardSet, geometry: ClipGeometry, data: ReadingConfig, group: ProcessGroup
) -> Iterator[torch.Tensor]:
    """Batches of one clip each of as many videos; a set's order is random, so its first ones are a fair share."""
    batches = ProbeClips(
        train,
        geometry,
        device=group.device,
        decoder_device=data.decoder_device(group.device),
        num_clips=1,
        batch_videos=RECALIBRATION_VIDEOS,
        threads=num_threads(),
    )
    for batch in islice(batches, RECALIBRATION_BATCHES):
        yield batch.clips[:, 0]


def _answers(train: Features, test: Features, num_classes: int, config: FrozenConfig) -> Answers:
    if isinstance(config, SvmEvaluation):
        return svm_answers(train, test, config.svm)
    if isinstance(config, KnnEvaluation):
        return knn_answers(train, test, num_classes, config.knn)
    return retrieval_answers(train, test)


def num_threads() -> int:
    """Decoding threads of this rank: its share of the machine."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_SIZE", "1")))

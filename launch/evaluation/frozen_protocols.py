"""Protocols on frozen features: all ranks extract the features of both sets, the first rank fits a probe."""

import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from dataloading.loader.probe_clips import ClipGeometry
from dataloading.reading.shard_set import ShardSet
from launch.evaluation.config import FrozenConfig, KnnEvaluation, SvmEvaluation
from launch.evaluation.encoder_under_test import EncoderUnderTest
from launch.evaluation.inputs import open_split, rank_clips, recalibration_clips
from launch.run.parts import errors_name_rank
from launch.terminal.progress import track
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.evaluation.feature_cache import FeatureCache, module_digest
from mcl_dist.evaluation.features import Features, check_finite, extract_features, gather_features, recalibrate
from mcl_dist.evaluation.knn import example_neighbours, knn_predictions, retrieval_predictions
from mcl_dist.evaluation.metrics import Predictions, Scores, score
from mcl_dist.evaluation.svm import svm_predictions
from mcl_dist.model.encoder import Encoder


def evaluate_frozen(
    under_test: EncoderUnderTest, train_url: str, test_url: str, config: FrozenConfig, group: ProcessGroup | None = None
) -> Scores | None:
    """Fit a probe to features of one set and score it on the other (METHOD.md, section 6).

    All ranks of `group` must call it together; the first gets the scores, the others None. Without a group this
    process works alone, on a GPU if there is one.

    Raises:
        UserError: a set cannot be read or has no labels, the sets' classes differ, or a class has no training video.
        ConfigError: a set does not store the frames that the stride needs.
    """
    group = group or ProcessGroup(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with open_split(train_url, test_url, config.data, group) as (train, test):
        encoder, geometry = under_test.encoder.to(group.device), under_test.clip_geometry(config.clips)
        if under_test.needs_recalibration(config.recalibrate):
            recalibrate(encoder, recalibration_clips(train, geometry, config.data, group))
        extractor = _Extractor(encoder, geometry, config, group)
        features = extractor.features(train, "training features"), extractor.features(test, "test features")
        classes = train.manifest.classes
    if not group.is_first:
        return None
    scores = score(_predictions(*features, len(classes), config), classes, config.bootstrap)
    return replace(scores, neighbours=example_neighbours(*features))


@dataclass(frozen=True)
class _Extractor:
    """Extracts the features of shard sets over all ranks, through the feature cache."""

    encoder: Encoder
    geometry: ClipGeometry
    config: FrozenConfig
    group: ProcessGroup

    def features(self, shard_set: ShardSet, title: str) -> Features:
        """Features of a set, complete on the first rank at least; all ranks must call it together."""
        cache, description = FeatureCache(self.config.features), f"{title} of {len(shard_set)} videos"
        cache_key = {
            "encoder": {"sha256": module_digest(self.encoder), **asdict(self.encoder.config)},
            "set": shard_set.manifest.digest,
            "clips": {**asdict(self.geometry), "count": self.config.clips.count, "crops": self.config.clips.crops},
        }
        cached, message = cache.read(cache_key) if self.group.is_first else (None, "")
        if message:
            print(f"{description}: {message}", file=sys.stderr)
        if self.group.from_first(int(cached is not None)):
            return cached or Features(np.empty((0, self.encoder.feature_dim), np.float32), np.empty(0, np.int64))
        features = self._extract(shard_set, description)
        if self.group.is_first and (message := cache.write(cache_key, features)):
            print(f"{title}: {message}", file=sys.stderr)
        return features

    def _extract(self, shard_set: ShardSet, title: str) -> Features:
        """Extract this rank's share of a set and gather the shares of all ranks."""
        clips = rank_clips(shard_set, self.geometry, self.group, self.config.data, self.config.clips)
        batches = track(clips, len(clips), title) if self.group.is_first else clips
        with errors_name_rank(self.group):
            own = extract_features(self.encoder, ((batch.clips, batch.labels) for batch in batches))
            check_finite(own, clips.name_of)
        return gather_features(own, len(shard_set), self.group)


def _predictions(train: Features, test: Features, num_classes: int, config: FrozenConfig) -> Predictions:
    if isinstance(config, SvmEvaluation):
        return svm_predictions(train, test, config.svm)
    if isinstance(config, KnnEvaluation):
        return knn_predictions(train, test, num_classes, config.knn)
    return retrieval_predictions(train, test)

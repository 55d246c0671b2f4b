"""The configurations of evaluations, composed of the sections that their parts own."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataloading.clips import ClipsConfig
from dataloading.fetch import FetchConfig
from mcl_dist.evaluation.feature_cache import FeaturesConfig
from mcl_dist.evaluation.neighbours import KnnConfig
from mcl_dist.evaluation.scores import BootstrapConfig
from mcl_dist.evaluation.svm import SvmConfig


@dataclass(frozen=True)
class SetsConfig(FetchConfig):
    """How sets are fetched (see `FetchConfig`); `cache` is a local folder for shards of sets that are elsewhere."""

    cache: str | None = None


@dataclass(frozen=True)
class FrozenConfig:
    """What all protocols on frozen features have.

    Attributes:
        recalibrate: measure BatchNorm's statistics anew on training clips; None for untrained encoders only.
    """

    recalibrate: bool | None = None
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    data: SetsConfig = field(default_factory=SetsConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)


@dataclass(frozen=True)
class SvmEvaluation(FrozenConfig):
    """`mcl evaluate svm`."""

    svm: SvmConfig = field(default_factory=SvmConfig)


@dataclass(frozen=True)
class KnnEvaluation(FrozenConfig):
    """`mcl evaluate knn`."""

    knn: KnnConfig = field(default_factory=KnnConfig)


@dataclass(frozen=True)
class RetrievalEvaluation(FrozenConfig):
    """`mcl evaluate retrieval`."""

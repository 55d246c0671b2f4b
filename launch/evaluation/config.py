"""Configurations of the evaluations, composed of the sections that their parts own."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from dataloading.loader.config import ReadingConfig, SupervisedConfig
from dataloading.loader.probe_clips import ClipsConfig
from launch.run.config import RunConfig
from launch.supervision.hang_detection import SuperviseConfig
from mcl_dist.checkpoint import CheckpointConfig
from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError
from mcl_dist.evaluation.feature_cache import FeaturesConfig
from mcl_dist.evaluation.knn import KnnConfig
from mcl_dist.evaluation.metrics import BootstrapConfig
from mcl_dist.evaluation.svm import SvmConfig
from mcl_dist.model.encoder import STEM_STRIDE
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import OptimizerConfig

Evaluation = TypeVar("Evaluation", bound="TrainingEvaluation")


@dataclass(frozen=True)
class FrozenConfig:
    """Common to all protocols on frozen features."""

    recalibrate: bool | None = None  # measure BatchNorm's statistics on training clips; None: if untrained
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    data: ReadingConfig = field(default_factory=ReadingConfig)
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


@dataclass(frozen=True)
class LongClips(ClipsConfig):
    """Clips of the training protocols: longer than those of the pre-training."""

    frames: int | None = number(32, minimum=STEM_STRIDE[0])
    stride: int | None = number(2, minimum=1)


@dataclass(frozen=True)
class TrainingEvaluation:
    """Common to the protocols that train a classifier; like a pre-training, each is a run with a folder."""

    run: RunConfig
    clips: LongClips = field(default_factory=LongClips)
    data: SupervisedConfig = field(default_factory=SupervisedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)

    def in_subfolder(self: Evaluation, name: str) -> Evaluation:
        """A copy with the folders moved into a subfolder."""
        folder = self.checkpoint.folder
        return replace(
            self,
            run=replace(self.run, dir=f"{self.run.dir}/{name}"),
            checkpoint=replace(self.checkpoint, folder=folder and f"{folder}/{name}"),
        )

    def check(self, num_ranks: int) -> None:
        """Raise ConfigError if the ranks do not divide the batch, or the requested sharding is not supported."""
        self.optimizer.check()
        self.train.batch_per_rank(num_ranks)
        if self.optimizer.zero_stage == 3:
            reason = "each rank tests its own videos with all parameters"
            raise ConfigError(f"optimizer.zero_stage: found 3, must be at most 2 in an evaluation: {reason}")


@dataclass(frozen=True)
class LinearOptimizer(OptimizerConfig):
    """Learning rate of the linear layer for features of unit length; no weight decay, no warm-up."""

    learning_rate: float = number(16.0, minimum=0)
    weight_decay: float = number(0.0, minimum=0)
    warmup_epochs: float = number(0.0, minimum=0)


@dataclass(frozen=True)
class LinearTraining(TrainConfig):
    """Batch size and length of the linear layer's training."""

    global_batch: int = number(128, minimum=1)
    epochs: int = number(100, minimum=1)


@dataclass(frozen=True)
class LinearEvaluation(TrainingEvaluation):
    """`mcl evaluate linear`; `recalibrate` as in `FrozenConfig`."""

    recalibrate: bool | None = None
    optimizer: LinearOptimizer = field(default_factory=LinearOptimizer)
    train: LinearTraining = field(default_factory=LinearTraining)


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of a whole encoder; `batch_norm` and `checkpointing` are as in `EncoderConfig`."""

    dropout: float = number(0.9, minimum=0, maximum=0.99)  # share of the pooled features that training drops
    batch_norm: str = choice("local", "synchronized")  # without `shuffled`: there are no keys to shuffle
    checkpointing: bool = False


@dataclass(frozen=True)
class FinetuneClips(LongClips):
    """Clips of fine-tuning: three crops of a test clip."""

    crops: int = number(3, minimum=1, maximum=3)


@dataclass(frozen=True)
class FinetuneOptimizer(OptimizerConfig):
    """Learning rate of all parameters; no warm-up."""

    learning_rate: float = number(0.01, minimum=0)
    warmup_epochs: float = number(0.0, minimum=0)


@dataclass(frozen=True)
class FinetuneTraining(TrainConfig):
    """Batch size and length of fine-tuning."""

    global_batch: int = number(256, minimum=1)
    epochs: int = number(150, minimum=1)


@dataclass(frozen=True)
class FinetuneEvaluation(TrainingEvaluation):
    """`mcl evaluate finetune`."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    clips: FinetuneClips = field(default_factory=FinetuneClips)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    train: FinetuneTraining = field(default_factory=FinetuneTraining)

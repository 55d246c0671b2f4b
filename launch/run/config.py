"""The configuration of a pre-training run, composed of the sections that its parts own."""

from dataclasses import dataclass, field

from dataloading.loader.config import DataConfig, check_clips
from launch.supervision.hang_detection import SuperviseConfig
from mcl_dist.checkpoint import CheckpointConfig
from mcl_dist.config import number
from mcl_dist.errors import ConfigError
from mcl_dist.evaluation.knn import KnnConfig
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig
from mcl_dist.model.pretrained_weights import InitialConfig
from mcl_dist.objective.objective import ObjectiveConfig
from mcl_dist.training.config import TrainConfig
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from monitoring.http.server import MonitoringConfig


@dataclass(frozen=True)
class RunConfig:
    """Folder and seed of a run.

    Attributes:
        dir: the run folder: configuration, logs, metrics, checkpoints.
        seed: of weights, sample order, tubelets and shuffles.
        report: whether the first rank writes `report.html` after the last step; `mcl report` writes it at any time.
    """

    dir: str
    seed: int = number(0, minimum=0)
    report: bool = True


@dataclass(frozen=True)
class EvaluateConfig(KnnConfig):
    """kNN evaluation of the query encoder during training; `neighbours` and `temperature` as for `mcl evaluate knn`.

    Attributes:
        every: steps between two evaluations; one more follows the last step. None: no evaluation.
        train: URL of the set that supplies the neighbours; None: `data.train`.
        test: URL of the held-out set.
        videos: the first videos of each set, at most this many; a set's order is random, so they are an unbiased
            sample. None: all.
        clips: evenly spaced clips per video, of the size used in training.
    """

    every: int | None = number(None, minimum=1)
    train: str | None = None
    test: str | None = None
    videos: int | None = number(None, minimum=1)
    clips: int = number(4, minimum=1)

    def check(self, data_train: str | None) -> None:
        """Check that the evaluation has its sets; `data_train` is `data.train`.

        Raises:
            ConfigError: an evaluation without a set, or a set without an evaluation.
        """
        if self.every is None:
            if self.train or self.test:
                raise ConfigError("evaluate.every: missing; set it, or remove evaluate.train and evaluate.test")
            return
        if self.test is None:
            raise ConfigError("evaluate.test: missing; name the held-out set, or remove evaluate.every")
        if self.train is None and data_train is None:
            raise ConfigError("evaluate.train: missing; name the set of the neighbours: data.sets has several")

    @property
    def sets(self) -> tuple[str, ...]:
        """URLs of the sets that this section names."""
        return tuple(url for url in (self.train, self.test) if url)


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run."""

    run: RunConfig
    data: DataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    initial: InitialConfig = field(default_factory=InitialConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    supervise: SuperviseConfig = field(default_factory=SuperviseConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)


def check(config: PretrainConfig, num_ranks: int) -> None:
    """Check what spans several sections.

    Raises:
        ConfigError: the ranks do not divide the batch, the optimizer does not support the requested sharding, clips do
            not fit the encoder, `train.compile` conflicts with another section, or an evaluation lacks a set.
    """
    config.optimizer.check()
    config.monitoring.check()
    config.evaluate.check(config.data.train)
    if config.train.compile and config.optimizer.zero_stage == 3:
        conflict = "optimizer.zero_stage=3, which hooks every layer"
        raise ConfigError(f"train.compile: found true, must be false with {conflict}")
    if config.train.compile and config.objective.alignment_layer is not None:
        conflict = "objective.alignment_layer, which needs second derivatives"
        raise ConfigError(f"train.compile: found true, must be false with {conflict}")
    config.train.batch_per_rank(num_ranks)
    check_clips(config.data, config.encoder.grid(config.data.frames, config.data.crop))

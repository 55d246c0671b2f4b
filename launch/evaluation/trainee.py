"""The network that a training protocol trains, and its task."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

from dataloading.loader.probe_clips import ClipGeometry
from dataloading.reading.shard_set import ShardSet
from launch.evaluation.config import FinetuneConfig, FinetuneEvaluation, LinearEvaluation, TrainingEvaluation
from launch.evaluation.encoder_under_test import EncoderUnderTest
from launch.evaluation.inputs import recalibration_clips
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.evaluation.classifier import Classifier, LinearLayer
from mcl_dist.evaluation.features import recalibrate
from mcl_dist.model.encoder import Encoder, normalise


@dataclass(frozen=True)
class Task:
    """A classification task: a training set and a test set, in clips of one geometry."""

    train_url: str
    train: ShardSet
    test: ShardSet
    geometry: ClipGeometry
    config: TrainingEvaluation

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of both sets."""
        return self.train.manifest.classes


@dataclass(frozen=True)
class Trainee:
    """The network that a protocol trains, and what converts clips to its inputs."""

    network: LinearLayer
    prepare: Callable[[torch.Tensor], torch.Tensor]  # from clips uint8 (B, T, H, W, 3)
    encoder: Encoder  # part of the network when fine-tuning, else of `prepare`
    dropout: float  # share of the pooled features that training drops


def build_trainee(under_test: EncoderUnderTest, task: Task, group: ProcessGroup) -> Trainee:
    """Build the network of a protocol, equal on all ranks."""
    config = task.config
    if isinstance(config, FinetuneEvaluation):
        return _finetuned(under_test.encoder, task, config.finetune, group)
    encoder = under_test.encoder.to(group.device)
    if under_test.needs_recalibration(config.recalibrate if isinstance(config, LinearEvaluation) else None):
        recalibrate(encoder, recalibration_clips(task.train, task.geometry, config.data, group))
    return _linear(encoder, task, group)


def _finetuned(encoder: Encoder, task: Task, config: FinetuneConfig, group: ProcessGroup) -> Trainee:
    """A copy of the encoder with a linear layer; both are trained."""
    trained = Encoder(replace(encoder.config, batch_norm=config.batch_norm, checkpointing=config.checkpointing))
    trained.load_state_dict(encoder.state_dict())
    torch.manual_seed(task.config.run.seed)
    network = Classifier(trained, len(task.classes))
    return Trainee(network.to(group.device).train(), normalise, trained, config.dropout)


def _linear(encoder: Encoder, task: Task, group: ProcessGroup) -> Trainee:
    """A linear layer on the frozen encoder's features, scaled to unit length."""
    torch.manual_seed(task.config.run.seed)
    network = LinearLayer(encoder.feature_dim, len(task.classes))
    encoder.eval()
    autocasts = task.config.train.precision == "bfloat16"

    @torch.no_grad()
    def features(clips: torch.Tensor) -> torch.Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=autocasts):
            pooled = encoder(normalise(clips)).pooled
        return normalize(pooled.float(), dim=1)

    return Trainee(network.to(group.device).train(), features, encoder, dropout=0.0)

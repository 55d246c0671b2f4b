"""The request of an evaluation, as the command passes it to its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.evaluation.encoder_under_test import load_encoder_under_test, load_pretrain_config

if TYPE_CHECKING:
    from launch.evaluation.config import FrozenConfig, TrainingEvaluation
    from launch.evaluation.encoder_under_test import EncoderUnderTest

TRAINING_PROTOCOLS = ("linear", "finetune")  # train for long: each is a run with a folder


@dataclass(frozen=True)
class Job:
    """The request of a command line; ranks get it as JSON.

    Attributes:
        checkpoint: as for `load_encoder_under_test`.
        train, test: URLs of the splits' sets.
        config, overrides: file and overrides of the evaluation's configuration.
        pretrain, pretrain_overrides: those of the pre-training whose start `random` means.
        evaluated: the checkpoint that `checkpoint` meant when the command began; empty: not resolved.
    """

    protocol: str
    checkpoint: str
    train: Sequence[str]
    test: Sequence[str]
    config: str | None = None
    overrides: Sequence[str] = ()
    pretrain: str | None = None
    pretrain_overrides: Sequence[str] = ()
    as_json: bool = False
    evaluated: str = ""

    def frozen_config(self) -> FrozenConfig:
        """Load the configuration of a protocol on frozen features; errors as in `load_config`."""
        from launch.evaluation.config import KnnEvaluation, RetrievalEvaluation, SvmEvaluation
        from mcl_dist.config import load_config

        schemas = {"svm": SvmEvaluation, "knn": KnnEvaluation, "retrieval": RetrievalEvaluation}
        return load_config(schemas[self.protocol], self.config, self.overrides)

    def training_config(self, num_ranks: int) -> TrainingEvaluation:
        """Load the configuration of a training protocol; errors as in `load_config` and `TrainingEvaluation.check`."""
        from launch.evaluation.config import FinetuneEvaluation, LinearEvaluation
        from mcl_dist.config import load_config

        schemas: dict[str, type[TrainingEvaluation]] = {"linear": LinearEvaluation, "finetune": FinetuneEvaluation}
        config = load_config(schemas[self.protocol], self.config, self.overrides)
        config.check(num_ranks)
        return config

    def encoder_under_test(self) -> EncoderUnderTest:
        """Load the encoder; errors as in `load_encoder_under_test` and `load_config`."""
        if self.pretrain is None:
            return load_encoder_under_test(self.evaluated or self.checkpoint)
        return load_encoder_under_test(self.checkpoint, load_pretrain_config(self.pretrain, self.pretrain_overrides))

"""What an evaluation was asked to do, as the command hands it to its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.evaluation.encoder_under_test import load_pretrain_config, load_subject

if TYPE_CHECKING:
    from launch.evaluation.config import FrozenConfig, TrainingEvaluation
    from launch.evaluation.encoder_under_test import EncoderUnderTest

SUPERVISED = ("linear", "finetune")  # those that train for long: a run each, with a folder


@dataclass(frozen=True)
class Job:
    """What a command line asks for; ranks get it as JSON.

    Attributes:
        protocol: of `PROTOCOLS`.
        checkpoint: as for `load_subject`.
        evaluated: what it stood for when the command began; empty: whatever it stands for.
        train, test: URLs of the splits' sets.
        config, overrides: of the evaluation.
        pretrain, pretrain_overrides: the pre-training whose start `random` is, and changes of it.
        as_json: print for machines.
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

    def frozen(self) -> FrozenConfig:
        """The checked configuration of a protocol on frozen features; errors as of `load_config`."""
        from launch.evaluation.config import KnnEvaluation, RetrievalEvaluation, SvmEvaluation
        from mcl_dist.config import load_config

        schemas: dict[str, type[FrozenConfig]] = {
            "svm": SvmEvaluation,
            "knn": KnnEvaluation,
            "retrieval": RetrievalEvaluation,
        }
        return load_config(schemas[self.protocol], self.config, self.overrides)

    def supervised(self, num_ranks: int) -> TrainingEvaluation:
        """… of one that trains, on so many ranks."""
        from launch.evaluation.config import FinetuneEvaluation, LinearEvaluation
        from mcl_dist.config import load_config

        schemas: dict[str, type[TrainingEvaluation]] = {"linear": LinearEvaluation, "finetune": FinetuneEvaluation}
        config = load_config(schemas[self.protocol], self.config, self.overrides)
        config.check(num_ranks)
        return config

    def subject(self) -> EncoderUnderTest:
        """What is evaluated; errors as of `load_subject`."""
        if self.pretrain is None:
            return load_subject(self.evaluated or self.checkpoint)
        return load_subject(self.checkpoint, load_pretrain_config(self.pretrain, self.pretrain_overrides))

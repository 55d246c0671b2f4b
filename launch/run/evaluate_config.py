"""Configuration of the evaluations during a pre-training run."""

from dataclasses import dataclass

from mcl_dist.config import number
from mcl_dist.errors import ConfigError
from mcl_dist.evaluation.knn import KnnConfig


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

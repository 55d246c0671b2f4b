"""Whether a run is evaluated on its way, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from mcl_dist.config import number
from mcl_dist.errors import ConfigError
from mcl_dist.evaluation.knn import KnnConfig


@dataclass(frozen=True)
class EvaluateConfig(KnnConfig):
    """Whether and how the query encoder is scored on its way; neighbours and temperature as of `mcl evaluate knn`.

    Attributes:
        every: steps from one evaluation to the next; there is one after the last step, too. None: no evaluation.
        train: URL of the set whose videos are the neighbours; None: `data.train`.
        test: URL of the set that is held out.
        videos: of each set, at most; a set's order is random, so its first ones are a fair share. None: all.
        clips: evenly spaced ones of a video, of the size that is trained on.
    """

    every: int | None = number(None, minimum=1)
    train: str | None = None
    test: str | None = None
    videos: int | None = number(None, minimum=1)
    clips: int = number(4, minimum=1)

    def check(self, data_train: str | None) -> None:
        """What no field can check alone; `data_train` is `data.train`.

        Raises:
            ConfigError: an evaluation that lacks a set, or a set without an evaluation.
        """
        if self.every is None:
            if self.train or self.test:
                raise ConfigError("evaluate.every: missing; say after how many steps to evaluate, or name no sets")
            return
        if self.test is None:
            raise ConfigError("evaluate.test: missing; name the set to be tested on, or leave evaluate.every out")
        if self.train is None and data_train is None:
            raise ConfigError("evaluate.train: missing; name the set to take neighbours from, as data.sets are several")

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that it names itself."""
        return tuple(url for url in (self.train, self.test) if url)

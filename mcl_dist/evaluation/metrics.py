"""What a protocol says of an encoder: accuracies, with the spread that other test videos would give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from mcl_dist.config import number
from mcl_dist.errors import UserError

MEAN_CLASS = "mean_class"


@dataclass(frozen=True)
class BootstrapConfig:
    """How intervals are found: the 95 % in the middle of what sets of as many test videos, drawn from them with
    repetition, score.

    Attributes:
        samples: sets drawn.
        seed: of the draws.
    """

    samples: int = number(1000, minimum=100)
    seed: int = number(0, minimum=0)


class Answers(NamedTuple):
    """What a protocol answered for the test videos.

    Attributes:
        hits: bool (V,) for each measure, as `top1`: whether a video was a hit.
        chosen: int64 (V,), the class that was taken for each video's; -1 for none.
        labels: int64 (V,), the right one.
    """

    hits: dict[str, np.ndarray]
    chosen: np.ndarray
    labels: np.ndarray


class Neighbours(NamedTuple):
    """A test video and the training videos that are nearest to it, nearest first.

    Attributes:
        video, label: its place in the features and its class.
        nearest, labels, cosines: theirs.
    """

    video: int
    label: int
    nearest: list[int]
    labels: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class ClassScore:
    """One class's test videos and the share of them that was told right."""

    name: str
    videos: int
    accuracy: float | None


@dataclass(frozen=True)
class Scores:
    """One split's result.

    Attributes:
        measures: fractions by name: those of `Answers.hits`, and the mean class accuracy as `mean_class`.
        videos: test videos.
        classes: in the order of their labels; those without a test video do not enter the mean.
        confusion: test videos of each class (rows) taken for each class (columns).
        replicates: float64 (samples,) by measure, what the bootstrap's sets score.
        neighbours: of a few test videos, where the protocol has features of both sets; no part of the JSON.
    """

    measures: dict[str, float]
    videos: int
    classes: tuple[ClassScore, ...]
    confusion: np.ndarray
    replicates: dict[str, np.ndarray]
    neighbours: Sequence[Neighbours] = ()

    def to_json(self) -> dict[str, Any]:
        """For machines; intervals instead of the bootstrap's sets."""
        return {
            **self.measures,
            "videos": self.videos,
            "intervals": {name: interval(values) for name, values in self.replicates.items()},
            "classes": [asdict(each) for each in self.classes],
            "confusion": self.confusion.tolist(),
        }


def answers_from_scores(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray | None = None) -> Answers:
    """Top-1 and top-5 of scores (V, classes); a label that is none of the classes is missed.

    Args:
        scores: the higher, the likelier.
        labels: int64 (V,), the right ones.
        classes: int64 (classes,), the labels that the columns stand for; None: 0, 1, ….
    """
    known = np.arange(scores.shape[1]) if classes is None else classes
    choices = known[np.argsort(-scores, axis=1, kind="stable")]
    hits = choices == labels[:, None]
    return Answers({"top1": hits[:, 0], "top5": hits[:, :5].any(axis=1)}, choices[:, 0], labels)


def score(answers: Answers, names: Sequence[str], config: BootstrapConfig) -> Scores:
    """Measures of a split with classes of these names, and the bootstrap's.

    Raises:
        UserError: no test video.
    """
    if not len(answers.labels):
        raise UserError("the test set has no video; build one that has")
    right = answers.chosen == answers.labels
    counts = np.bincount(answers.labels, minlength=len(names))
    told = np.bincount(answers.labels, weights=right, minlength=len(names))
    classes = tuple(
        ClassScore(name, int(count), float(hits / count) if count else None)
        for name, count, hits in zip(names, counts, told, strict=True)
    )
    confusion = np.zeros((len(names), len(names)), np.int64)
    known = answers.chosen >= 0
    np.add.at(confusion, (answers.labels[known], answers.chosen[known]), 1)
    everyone = np.arange(len(answers.labels))
    rng = np.random.default_rng(config.seed)
    drawn = [_measures(answers, rng.integers(len(everyone), size=len(everyone))) for _ in range(config.samples)]
    found = measures(answers)
    replicates = {name: np.array([each[name] for each in drawn]) for name in found}
    return Scores(found, len(everyone), classes, confusion, replicates)


def measures(answers: Answers) -> dict[str, float]:
    """Fractions by name, as `Scores.measures`."""
    return _measures(answers, np.arange(len(answers.labels)))


def interval(replicates: np.ndarray) -> list[float]:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return [float(low), float(high)]


def mean_of_splits(splits: Sequence[Scores]) -> dict[str, Any]:
    """Measures of several splits' mean, and its intervals: the splits' sets are drawn independently."""
    names = splits[0].measures
    rng = np.random.default_rng(0)

    def replicates(name: str) -> np.ndarray:
        # Splits of one size are drawn alike, by one seed: shuffled, the draws of one say nothing of another's.
        means: np.ndarray = np.mean([rng.permutation(split.replicates[name]) for split in splits], axis=0)
        return means

    return {
        **{name: float(np.mean([split.measures[name] for split in splits])) for name in names},
        "videos": sum(split.videos for split in splits),
        "intervals": {name: interval(replicates(name)) for name in names},
    }


def _measures(answers: Answers, videos: np.ndarray) -> dict[str, float]:
    """Of the videos at these places, some perhaps several times."""
    labels = answers.labels[videos]
    counts = np.bincount(labels)
    told = np.bincount(labels, weights=answers.chosen[videos] == labels)
    present = counts > 0
    means = {name: float(hits[videos].mean()) for name, hits in answers.hits.items()}
    return {**means, MEAN_CLASS: float((told[present] / counts[present]).mean())}

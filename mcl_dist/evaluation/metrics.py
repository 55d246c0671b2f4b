"""Accuracies of a protocol, with bootstrap confidence intervals over the test videos."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from mcl_dist.config import number
from mcl_dist.errors import UserError

MEAN_CLASS = "mean_class"


@dataclass(frozen=True)
class BootstrapConfig:
    """Bootstrap of the 95 % intervals: resample the test videos with replacement, `samples` times."""

    samples: int = number(1000, minimum=100)
    seed: int = number(0, minimum=0)


class Predictions(NamedTuple):
    """Predictions of a protocol for V test videos.

    Attributes:
        hits: bool (V,) by measure, such as `top1`: whether each video is a hit.
        predicted: int64 (V,), predicted class; -1 for none.
        labels: int64 (V,), true class.
    """

    hits: dict[str, np.ndarray]
    predicted: np.ndarray
    labels: np.ndarray


class Neighbours(NamedTuple):
    """A test video and its nearest training videos, nearest first.

    Attributes:
        video, label: row in the features and class of the test video.
        nearest, labels, cosines: rows, classes and cosine similarities of the training videos.
    """

    video: int
    label: int
    nearest: list[int]
    labels: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class ClassScore:
    """One class: its test videos and the share of them that is predicted right."""

    name: str
    videos: int
    accuracy: float | None


@dataclass(frozen=True)
class Scores:
    """Scores of one split.

    Attributes:
        measures: fractions by name: those of `Predictions.hits`, and the mean class accuracy as `mean_class`.
        videos: number of test videos.
        classes: in label order; classes without test videos do not count in the mean.
        confusion: number of test videos by true class (rows) and predicted class (columns).
        replicates: float64 (samples,) by measure: scores of the bootstrap's sets.
        neighbours: of a few test videos, if the protocol has features of both sets; not in the JSON.
    """

    measures: dict[str, float]
    videos: int
    classes: tuple[ClassScore, ...]
    confusion: np.ndarray
    replicates: dict[str, np.ndarray]
    neighbours: Sequence[Neighbours] = ()

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON, with intervals instead of the bootstrap's replicates."""
        return {
            **self.measures,
            "videos": self.videos,
            "intervals": {name: interval(values) for name, values in self.replicates.items()},
            "classes": [asdict(each) for each in self.classes],
            "confusion": self.confusion.tolist(),
        }


def predictions_from_scores(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray | None = None) -> Predictions:
    """Top-1 and top-5 of scores (V, classes); a video whose label is not in `classes` is never a hit.

    Args:
        scores: higher is more likely.
        labels: int64 (V,), true classes.
        classes: int64 (classes,), label of each column; None for 0, 1, ….
    """
    column_labels = np.arange(scores.shape[1]) if classes is None else classes
    ranking = column_labels[np.argsort(-scores, axis=1, kind="stable")]
    hits = ranking == labels[:, None]
    return Predictions({"top1": hits[:, 0], "top5": hits[:, :5].any(axis=1)}, ranking[:, 0], labels)


def score(predictions: Predictions, names: Sequence[str], config: BootstrapConfig) -> Scores:
    """Scores of a split, with the bootstrap's replicates; `names` are those of the classes, in label order.

    Raises:
        UserError: there is no test video.
    """
    if not len(predictions.labels):
        raise UserError("the test set has no videos; build one with videos")
    right = predictions.predicted == predictions.labels
    counts = np.bincount(predictions.labels, minlength=len(names))
    num_right = np.bincount(predictions.labels, weights=right, minlength=len(names))
    classes = tuple(
        ClassScore(name, int(count), float(hits / count) if count else None)
        for name, count, hits in zip(names, counts, num_right, strict=True)
    )
    confusion = np.zeros((len(names), len(names)), np.int64)
    has_class = predictions.predicted >= 0
    np.add.at(confusion, (predictions.labels[has_class], predictions.predicted[has_class]), 1)
    rng, size = np.random.default_rng(config.seed), len(predictions.labels)
    resampled = [measures(predictions, rng.integers(size, size=size)) for _ in range(config.samples)]
    measured = measures(predictions)
    replicates = {name: np.array([each[name] for each in resampled]) for name in measured}
    return Scores(measured, size, classes, confusion, replicates)


def measures(predictions: Predictions, videos: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Fractions by name, as `Scores.measures`, over all videos or those at the given rows, which may repeat."""
    labels = predictions.labels[videos]
    counts = np.bincount(labels)
    num_right = np.bincount(labels, weights=predictions.predicted[videos] == labels)
    present = counts > 0
    means = {name: float(hits[videos].mean()) for name, hits in predictions.hits.items()}
    return {**means, MEAN_CLASS: float((num_right[present] / counts[present]).mean())}


def interval(replicates: np.ndarray) -> list[float]:
    """The 95 % interval: the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return [float(low), float(high)]


def mean_of_splits(splits: Sequence[Scores]) -> dict[str, Any]:
    """Mean measures over splits, and their intervals; the splits' bootstraps count as independent."""
    names = splits[0].measures
    rng = np.random.default_rng(0)

    def replicates(name: str) -> np.ndarray:
        # Splits of equal size have the same resampled rows (one seed); shuffling makes their replicates independent.
        means: np.ndarray = np.mean([rng.permutation(split.replicates[name]) for split in splits], axis=0)
        return means

    return {
        **{name: float(np.mean([split.measures[name] for split in splits])) for name in names},
        "videos": sum(split.videos for split in splits),
        "intervals": {name: interval(replicates(name)) for name in names},
    }

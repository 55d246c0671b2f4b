"""The linear SVM on frozen features (METHOD.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.svm import LinearSVC

from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features

MAX_ITERATIONS = 10_000  # liblinear's own 1000 end too early on raw features


@dataclass(frozen=True)
class Accuracy:
    """Fractions of the test videos whose class is the first, or among the first five, of the probe's choices."""

    top1: float
    top5: float
    videos: int


def svm_accuracy(train: Features, test: Features, *, cost: float = 1.0) -> Accuracy:
    """Train one-against-rest SVMs (L2-regularised, squared hinge) on raw features, and test them.

    Raises:
        UserError: no test video, or training videos of fewer than two classes.
    """
    if not len(test.labels):
        raise UserError("the test set has no video; build one that has")
    if len(np.unique(train.labels)) < 2:
        raise UserError("the training set has videos of fewer than two classes; a probe needs two")
    svm = LinearSVC(C=cost, loss="squared_hinge", penalty="l2", max_iter=MAX_ITERATIONS, random_state=0)
    svm.fit(train.vectors, train.labels)
    scores = svm.decision_function(test.vectors)
    if scores.ndim == 1:  # scikit-learn gives two classes one column
        scores = np.stack([-scores, scores], axis=1)
    return accuracy(scores, test.labels, svm.classes_)


def accuracy(scores: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> Accuracy:
    """Top-1 and top-5 of scores (videos, classes); a label that is none of the classes counts as missed."""
    choices = classes[np.argsort(-scores, axis=1, kind="stable")]
    hits = choices == labels[:, None]
    return Accuracy(float(hits[:, :1].any(axis=1).mean()), float(hits[:, :5].any(axis=1).mean()), len(labels))

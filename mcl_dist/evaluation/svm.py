"""The linear SVM on frozen features (METHOD.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mcl_dist.config import number
from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.metrics import Answers, answers_from_scores

MAX_ITERATIONS = 10_000  # liblinear's own 1000 end too early on raw features


@dataclass(frozen=True)
class SvmConfig:
    """`cost` is C, what a training video on the wrong side costs."""

    cost: float = number(1.0, minimum=1e-9)


def svm_answers(train: Features, test: Features, config: SvmConfig) -> Answers:
    """Train one-against-rest SVMs (L2-regularised, squared hinge) on raw features, and ask them for the test videos.

    Raises:
        UserError: training videos of fewer than two classes.
    """
    from sklearn.svm import LinearSVC  # takes as long as PyTorch, and ranks that train import this module

    if len(np.unique(train.labels)) < 2:
        raise UserError("the training set has videos of fewer than two classes; a probe needs two")
    svm = LinearSVC(C=config.cost, loss="squared_hinge", penalty="l2", max_iter=MAX_ITERATIONS, random_state=0)
    svm.fit(train.vectors, train.labels)
    scores = svm.decision_function(test.vectors)
    if scores.ndim == 1:  # scikit-learn gives two classes one column
        scores = np.stack([-scores, scores], axis=1)
    return answers_from_scores(scores, test.labels, svm.classes_)

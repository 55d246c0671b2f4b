"""The linear SVM on frozen features (METHOD.md, section 6)."""

from dataclasses import dataclass

import numpy as np

from mcl_dist.config import number
from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.metrics import Predictions, predictions_from_scores

MAX_ITERATIONS = 10_000  # liblinear's default of 1000 is too few for raw features


@dataclass(frozen=True)
class SvmConfig:
    """Linear SVM; `cost` is C, the penalty of a training video on the wrong side."""

    cost: float = number(1.0, minimum=1e-9)


def svm_predictions(train: Features, test: Features, config: SvmConfig) -> Predictions:
    """Train one-versus-rest SVMs (L2-regularised, squared hinge) on raw features; predict the test videos' classes.

    Raises:
        UserError: the training videos have fewer than two classes.
    """
    from sklearn.svm import LinearSVC  # as slow to import as PyTorch, and training ranks import this module

    if len(np.unique(train.labels)) < 2:
        raise UserError("the training set has videos of fewer than two classes; use one with at least two")
    svm = LinearSVC(C=config.cost, loss="squared_hinge", penalty="l2", max_iter=MAX_ITERATIONS, random_state=0)
    svm.fit(train.vectors, train.labels)
    scores = svm.decision_function(test.vectors)
    if scores.ndim == 1:  # for two classes scikit-learn returns one column
        scores = np.stack([-scores, scores], axis=1)
    return predictions_from_scores(scores, test.labels, svm.classes_)

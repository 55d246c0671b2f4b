from __future__ import annotations

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.svm import SvmConfig, svm_predictions


def _clusters(num_classes: int, seed: int, spread: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), 10)
    centres = 5 * np.eye(num_classes, 8)
    return Features((centres[labels] + spread * rng.normal(size=(len(labels), 8))).astype(np.float32), labels)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_separable_classes_are_classified_without_error(num_classes: int) -> None:
    predictions = svm_predictions(_clusters(num_classes, seed=0), _clusters(num_classes, seed=1), SvmConfig())
    assert predictions.hits["top1"].all()
    assert predictions.hits["top5"].all()


def test_predictions_equal_those_of_scikit_learn() -> None:
    train, test = _clusters(6, seed=0, spread=4), _clusters(6, seed=1, spread=4)
    svm = LinearSVC(C=0.5, random_state=0, max_iter=10_000).fit(train.vectors, train.labels)
    predictions = svm_predictions(train, test, SvmConfig(cost=0.5))
    assert np.array_equal(predictions.predicted, svm.predict(test.vectors))
    assert predictions.hits["top1"].mean() == svm.score(test.vectors, test.labels)
    assert 0.3 < predictions.hits["top1"].mean() < 1


def test_a_training_set_with_one_class_is_rejected() -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        svm_predictions(_clusters(1, seed=0), _clusters(1, seed=1), SvmConfig())

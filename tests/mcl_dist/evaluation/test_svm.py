from __future__ import annotations

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.svm import SvmConfig, svm_answers


def _clusters(num_classes: int, seed: int, spread: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), 10)
    centres = 5 * np.eye(num_classes, 8)
    return Features((centres[labels] + spread * rng.normal(size=(len(labels), 8))).astype(np.float32), labels)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_separable_classes_are_told_apart(num_classes: int) -> None:
    answers = svm_answers(_clusters(num_classes, seed=0), _clusters(num_classes, seed=1), SvmConfig())
    assert answers.hits["top1"].all()
    assert answers.hits["top5"].all()


def test_its_answers_are_those_of_scikit_learn_itself() -> None:
    train, test = _clusters(6, seed=0, spread=4), _clusters(6, seed=1, spread=4)
    direct = LinearSVC(C=0.5, random_state=0, max_iter=10_000).fit(train.vectors, train.labels)
    answers = svm_answers(train, test, SvmConfig(cost=0.5))
    assert np.array_equal(answers.chosen, direct.predict(test.vectors))
    assert answers.hits["top1"].mean() == direct.score(test.vectors, test.labels)
    assert 0.3 < answers.hits["top1"].mean() < 1


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        svm_answers(_clusters(1, seed=0), _clusters(1, seed=1), SvmConfig())

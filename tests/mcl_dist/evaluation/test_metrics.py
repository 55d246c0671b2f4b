from __future__ import annotations

import json

import numpy as np
import pytest

from mcl_dist.errors import UserError
from mcl_dist.evaluation.metrics import Answers, BootstrapConfig, answers_from_scores, mean_of_splits, score

CONFIG = BootstrapConfig(samples=200)


def _answers(chosen: list[int], labels: list[int]) -> Answers:
    right = np.array(chosen) == np.array(labels)
    return Answers({"top1": right}, np.array(chosen), np.array(labels))


def test_top5_counts_a_class_among_the_first_five_choices() -> None:
    scores = np.array([[7.0, 6, 5, 4, 3, 2, 1]] * 7)
    hits = answers_from_scores(scores, np.arange(7)).hits
    assert (hits["top1"].mean(), hits["top5"].mean()) == (1 / 7, 5 / 7)


def test_a_class_that_training_never_showed_counts_as_missed() -> None:
    hits = answers_from_scores(np.array([[1.0, 0.0]] * 2), np.array([0, 9]), np.array([0, 1])).hits
    assert (hits["top1"].mean(), hits["top5"].mean()) == (0.5, 0.5)


def test_the_mean_over_classes_weighs_each_class_alike() -> None:
    found = score(_answers([0, 0, 0, 0], [0, 0, 0, 1]), ("a", "b"), CONFIG)
    assert found.measures == {"top1": 0.75, "mean_class": 0.5}


def test_a_class_without_a_test_video_has_no_accuracy_and_is_left_out_of_the_mean() -> None:
    found = score(_answers([0, 2], [0, 0]), ("a", "b", "c"), CONFIG)
    assert [each.accuracy for each in found.classes] == [0.5, None, None]
    assert found.measures["mean_class"] == 0.5


def test_the_confusion_has_a_row_for_each_class_and_a_column_for_what_it_was_taken_for() -> None:
    found = score(_answers([1, 1, 0], [0, 1, 0]), ("a", "b"), CONFIG)
    assert found.confusion.tolist() == [[1, 1], [0, 1]]


def test_intervals_repeat_and_are_those_of_the_binomial() -> None:
    labels = np.zeros(400, np.int64)
    answers = Answers({"top1": np.arange(400) < 300}, labels, labels)
    config = BootstrapConfig(samples=2000)
    (low, high), again = (score(answers, ("a",), config).to_json()["intervals"]["top1"] for _ in range(2))
    assert [low, high] == again
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert abs(low - (0.75 - 1.96 * deviation)) < 0.005
    assert abs(high - (0.75 + 1.96 * deviation)) < 0.005


def test_the_mean_of_splits_has_a_narrower_interval_than_each() -> None:
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(3):
        labels = rng.integers(2, size=100)
        chosen = np.where(rng.random(100) < 0.7, labels, 1 - labels)
        splits.append(score(_answers(chosen.tolist(), labels.tolist()), ("a", "b"), BootstrapConfig(500)))
    mean = mean_of_splits(splits)
    widths = [np.ptp(split.to_json()["intervals"]["top1"]) for split in splits]
    assert mean["top1"] == pytest.approx(np.mean([split.measures["top1"] for split in splits]))
    assert mean["videos"] == 300
    # As of independent draws, though all splits are drawn by one seed.
    assert np.ptp(mean["intervals"]["top1"]) == pytest.approx(np.mean(widths) / np.sqrt(3), rel=0.1)
    json.dumps([mean, splits[0].to_json()])


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(UserError, match="no video"):
        score(_answers([], []), ("a",), CONFIG)

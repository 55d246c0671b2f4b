from __future__ import annotations

import json

import numpy as np
import pytest

from mcl_dist.errors import UserError
from mcl_dist.evaluation.metrics import BootstrapConfig, Predictions, mean_of_splits, predictions_from_scores, score

CONFIG = BootstrapConfig(samples=200)


def _predictions(predicted: list[int], labels: list[int]) -> Predictions:
    is_right = np.array(predicted) == np.array(labels)
    return Predictions({"top1": is_right}, np.array(predicted), np.array(labels))


def test_top5_counts_a_class_among_the_five_highest_scores() -> None:
    scores = np.array([[7.0, 6, 5, 4, 3, 2, 1]] * 7)
    hits = predictions_from_scores(scores, np.arange(7)).hits
    assert (hits["top1"].mean(), hits["top5"].mean()) == (1 / 7, 5 / 7)


def test_a_class_without_training_videos_is_never_a_hit() -> None:
    hits = predictions_from_scores(np.array([[1.0, 0.0]] * 2), np.array([0, 9]), np.array([0, 1])).hits
    assert (hits["top1"].mean(), hits["top5"].mean()) == (0.5, 0.5)


def test_mean_class_accuracy_weights_classes_equally() -> None:
    scores = score(_predictions([0, 0, 0, 0], [0, 0, 0, 1]), ("a", "b"), CONFIG)
    assert scores.measures == {"top1": 0.75, "mean_class": 0.5}


def test_a_class_without_test_videos_has_no_accuracy_and_does_not_count_in_the_mean() -> None:
    scores = score(_predictions([0, 2], [0, 0]), ("a", "b", "c"), CONFIG)
    assert [each.accuracy for each in scores.classes] == [0.5, None, None]
    assert scores.measures["mean_class"] == 0.5


def test_the_confusion_matrix_has_true_classes_as_rows_and_predicted_ones_as_columns() -> None:
    scores = score(_predictions([1, 1, 0], [0, 1, 0]), ("a", "b"), CONFIG)
    assert scores.confusion.tolist() == [[1, 1], [0, 1]]


def test_intervals_are_reproducible_and_match_the_binomial_distribution() -> None:
    labels = np.zeros(400, np.int64)
    predictions = Predictions({"top1": np.arange(400) < 300}, labels, labels)
    config = BootstrapConfig(samples=2000)
    (low, high), again = (score(predictions, ("a",), config).to_json()["intervals"]["top1"] for _ in range(2))
    assert [low, high] == again
    deviation = np.sqrt(0.75 * 0.25 / 400)
    assert abs(low - (0.75 - 1.96 * deviation)) < 0.005
    assert abs(high - (0.75 + 1.96 * deviation)) < 0.005


def test_the_mean_over_splits_has_a_narrower_interval_than_each_split() -> None:
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(3):
        labels = rng.integers(2, size=100)
        predicted = np.where(rng.random(100) < 0.7, labels, 1 - labels)
        splits.append(score(_predictions(predicted.tolist(), labels.tolist()), ("a", "b"), BootstrapConfig(500)))
    mean = mean_of_splits(splits)
    widths = [np.ptp(split.to_json()["intervals"]["top1"]) for split in splits]
    assert mean["top1"] == pytest.approx(np.mean([split.measures["top1"] for split in splits]))
    assert mean["videos"] == 300
    # As for independent bootstraps, although all splits use one seed.
    assert np.ptp(mean["intervals"]["top1"]) == pytest.approx(np.mean(widths) / np.sqrt(3), rel=0.1)
    json.dumps([mean, splits[0].to_json()])


def test_an_empty_test_set_is_rejected() -> None:
    with pytest.raises(UserError, match="no video"):
        score(_predictions([], []), ("a",), CONFIG)

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from mcl_dist.evaluation import knn
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.knn import KnnConfig, knn_predictions, nearest, retrieval_predictions


def _features(count: int, seed: int, num_classes: int = 4) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    vectors = np.eye(num_classes, 16)[labels] * 2 + rng.normal(size=(count, 16))
    return Features(vectors.astype(np.float32), labels)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TEST_CHUNK", 7)


def test_nearest_neighbours_equal_an_exhaustive_search_by_cosine() -> None:
    train, test = _features(50, 0).vectors, _features(20, 1).vectors
    rows, cosines = nearest(train, test, 6)
    distances, expected = (
        NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(train).kneighbors(test)
    )
    assert np.array_equal(rows, expected)
    assert np.allclose(cosines, 1 - distances, atol=1e-5)


def test_there_are_no_more_neighbours_than_training_videos() -> None:
    assert nearest(_features(3, 0).vectors, _features(2, 1).vectors, 50)[0].shape == (2, 3)


def test_the_weight_of_a_vote_is_the_exponential_of_its_cosine() -> None:
    train, test = _features(50, 0), _features(20, 1)
    unit_train, unit_test = (each.vectors / np.linalg.norm(each.vectors, axis=1)[:, None] for each in (train, test))
    cosines = unit_test @ unit_train.T
    expected = []
    for row in cosines:
        neighbours = np.argsort(-row)[:5]
        votes = np.bincount(train.labels[neighbours], weights=np.exp(row[neighbours] / 0.1), minlength=4)
        expected.append(int(votes.argmax()))
    assert knn_predictions(train, test, 4, KnnConfig(neighbours=5, temperature=0.1)).predicted.tolist() == expected


def test_with_a_tiny_temperature_the_nearest_neighbour_decides() -> None:
    train, test = _features(50, 0), _features(20, 1)
    rows, _ = nearest(train.vectors, test.vectors, 1)
    predictions = knn_predictions(train, test, 4, KnnConfig(temperature=0.001))
    assert np.array_equal(predictions.predicted, train.labels[rows[:, 0]])


def test_a_class_without_votes_is_not_a_hit() -> None:
    train = Features(np.array([[1, 0], [1, 0.1], [0, 1]], np.float32), np.array([3, 3, 0]))
    test = Features(np.array([[1, 0], [1, 0]], np.float32), np.array([3, 0]))
    predictions = knn_predictions(train, test, 4, KnnConfig(neighbours=2))
    assert {name: hits.tolist() for name, hits in predictions.hits.items()} == {
        "top1": [True, False],
        "top5": [True, False],
    }


def test_recall_counts_a_training_video_of_the_class_among_the_nearest() -> None:
    train = Features(np.eye(6, dtype=np.float32), np.array([0, 0, 0, 0, 0, 1]))
    direction = np.array([[6, 5, 4, 3, 2, 1.0]], np.float32)
    hits = retrieval_predictions(train, Features(direction, np.array([1]))).hits
    assert [bool(hits[f"recall_at_{count}"][0]) for count in (1, 5, 10, 20, 50)] == [False, False, True, True, True]


def test_recall_never_decreases_with_more_neighbours() -> None:
    hits = retrieval_predictions(_features(100, 0), _features(40, 1)).hits
    recalls = [hits[f"recall_at_{count}"].mean() for count in (1, 5, 10, 20, 50)]
    assert recalls == sorted(recalls)
    assert hits["top1"].mean() == recalls[0]

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from mcl_dist.evaluation import knn as neighbours
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.knn import KnnConfig, knn_answers, nearest, retrieval_answers


def _features(count: int, seed: int, num_classes: int = 4) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    vectors = np.eye(num_classes, 16)[labels] * 2 + rng.normal(size=(count, 16))
    return Features(vectors.astype(np.float32), labels)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TEST_AT_ONCE", 7)


def test_the_nearest_are_those_of_an_exhaustive_search_by_cosine() -> None:
    train, test = _features(50, 0).vectors, _features(20, 1).vectors
    places, cosines = nearest(train, test, 6)
    distances, expected = (
        NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(train).kneighbors(test)
    )
    assert np.array_equal(places, expected)
    assert np.allclose(cosines, 1 - distances, atol=1e-5)


def test_no_more_neighbours_come_than_there_are() -> None:
    assert nearest(_features(3, 0).vectors, _features(2, 1).vectors, 50)[0].shape == (2, 3)


def test_votes_weigh_the_exponential_of_the_cosine() -> None:
    train, test = _features(50, 0), _features(20, 1)
    unit_train, unit_test = (each.vectors / np.linalg.norm(each.vectors, axis=1)[:, None] for each in (train, test))
    cosines = unit_test @ unit_train.T
    expected = []
    for row in cosines:
        first = np.argsort(-row)[:5]
        votes = np.bincount(train.labels[first], weights=np.exp(row[first] / 0.1), minlength=4)
        expected.append(int(votes.argmax()))
    assert knn_answers(train, test, 4, KnnConfig(neighbours=5, temperature=0.1)).chosen.tolist() == expected


def test_a_tiny_temperature_leaves_the_vote_to_the_nearest() -> None:
    train, test = _features(50, 0), _features(20, 1)
    places, _ = nearest(train.vectors, test.vectors, 1)
    answers = knn_answers(train, test, 4, KnnConfig(temperature=0.001))
    assert np.array_equal(answers.chosen, train.labels[places[:, 0]])


def test_a_class_that_no_neighbour_votes_for_is_no_hit() -> None:
    train = Features(np.array([[1, 0], [1, 0.1], [0, 1]], np.float32), np.array([3, 3, 0]))
    test = Features(np.array([[1, 0], [1, 0]], np.float32), np.array([3, 0]))
    answers = knn_answers(train, test, 4, KnnConfig(neighbours=2))
    assert {name: hits.tolist() for name, hits in answers.hits.items()} == {
        "top1": [True, False],
        "top5": [True, False],
    }


def test_recall_counts_a_video_of_the_class_among_the_nearest() -> None:
    train = Features(np.eye(6, dtype=np.float32), np.array([0, 0, 0, 0, 0, 1]))
    towards = np.array([[6, 5, 4, 3, 2, 1.0]], np.float32)
    hits = retrieval_answers(train, Features(towards, np.array([1]))).hits
    assert [bool(hits[f"recall_at_{count}"][0]) for count in (1, 5, 10, 20, 50)] == [False, False, True, True, True]


def test_recall_never_falls_with_more_neighbours() -> None:
    hits = retrieval_answers(_features(100, 0), _features(40, 1)).hits
    recalls = [hits[f"recall_at_{count}"].mean() for count in (1, 5, 10, 20, 50)]
    assert recalls == sorted(recalls)
    assert hits["top1"].mean() == recalls[0]

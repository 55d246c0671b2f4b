"""Nearest neighbours by cosine: retrieval, and classification by their votes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from mcl_dist.config import number
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.metrics import Answers, Neighbours, answers_from_scores

RECALL_AT = (1, 5, 10, 20, 50)  # METHOD.md, section 6
NUM_SHOWN, NUM_NEAREST = 4, 5  # test videos whose neighbours a person looks at, and how many of each
TEST_AT_ONCE = 1024  # test videos whose similarities to all of the training set are held at a time


@dataclass(frozen=True)
class KnnConfig:
    """Votes of the nearest neighbours, each weighing exp(cosine / temperature).

    The vote is that of Wu et al. (CVPR 2018, arXiv 1805.01978, section 3.4), with their temperature; 20 neighbours
    are what Caron et al. (ICCV 2021, arXiv 2104.14294) found best throughout.
    """

    neighbours: int = number(20, minimum=1)
    temperature: float = number(0.07, minimum=1e-3)


def nearest(train: np.ndarray, test: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` training vectors (or all, if fewer) that are closest to each test vector; exact.

    Args:
        train: float32 (N, C), of any length but 0.
        test: float32 (V, C), likewise.
        count: neighbours wanted.

    Returns:
        Places in `train`, int64 (V, count), nearest first, and their cosines, float32.
    """
    count = min(count, len(train))
    towards = normalize(torch.from_numpy(train), dim=1)
    found = [
        torch.topk(normalize(part, dim=1) @ towards.T, count, dim=1)
        for part in torch.split(torch.from_numpy(test), TEST_AT_ONCE)
    ]
    return torch.cat([each.indices for each in found]).numpy(), torch.cat([each.values for each in found]).numpy()


def knn_answers(train: Features, test: Features, num_classes: int, config: KnnConfig) -> Answers:
    """The classes by their neighbours' votes; one that gets none is no hit, however few get any."""
    places, cosines = nearest(train.vectors, test.vectors, config.neighbours)
    votes = np.zeros((len(test.labels), num_classes))
    # The nearest one's weight is taken for 1: exp of the cosine itself may leave float's range.
    weights = np.exp((cosines - cosines[:, :1]).astype(np.float64) / config.temperature)
    np.add.at(votes, (np.arange(len(votes))[:, None], train.labels[places]), weights)
    answers = answers_from_scores(votes, test.labels)
    answers.hits["top5"] &= (train.labels[places] == test.labels[:, None]).any(axis=1)
    return answers


def retrieval_answers(train: Features, test: Features) -> Answers:
    """Whether one of the nearest 1, 5, 10, 20, 50 training videos is of the test video's class.

    As top-1 and top-5 count those among the nearest 1 and 5; a video is taken for its nearest one's class.
    """
    places, _ = nearest(train.vectors, test.vectors, max(RECALL_AT))
    found = train.labels[places]
    same = found == test.labels[:, None]
    hits = {f"recall_at_{count}": same[:, :count].any(axis=1) for count in RECALL_AT}
    return Answers({"top1": hits["recall_at_1"], "top5": hits["recall_at_5"], **hits}, found[:, 0], test.labels)


def neighbours_to_show(train: Features, test: Features) -> list[Neighbours]:
    """Of a few test videos, evenly spread over the set, whose order is random, the nearest training videos."""
    shown = np.unique(np.linspace(0, len(test.labels) - 1, NUM_SHOWN).round().astype(int))
    places, cosines = nearest(train.vectors, test.vectors[shown], NUM_NEAREST)
    rows = zip(shown.tolist(), test.labels[shown].tolist(), places, cosines, strict=True)
    return [
        Neighbours(video, label, near.tolist(), train.labels[near].tolist(), [float(f"{each:.4f}") for each in cosine])
        for video, label, near, cosine in rows
    ]

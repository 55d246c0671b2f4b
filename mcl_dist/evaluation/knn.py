"""Nearest neighbours by cosine similarity: retrieval and k-NN classification."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from mcl_dist.config import number
from mcl_dist.evaluation.features import Features
from mcl_dist.evaluation.metrics import Neighbours, Predictions, predictions_from_scores

RECALL_AT = (1, 5, 10, 20, 50)  # METHOD.md, section 6
NUM_EXAMPLES, NUM_NEAREST = 4, 5  # test videos in reports, and neighbours of each
TEST_CHUNK = 1024  # test videos per block of similarities to the training set


@dataclass(frozen=True)
class KnnConfig:
    """k-NN classification: each neighbour's vote has weight exp(cosine / temperature).

    Vote and temperature are those of Wu et al. (CVPR 2018, arXiv 1805.01978, section 3.4); 20 neighbours are best
    throughout in Caron et al. (ICCV 2021, arXiv 2104.14294).
    """

    neighbours: int = number(20, minimum=1)
    temperature: float = number(0.07, minimum=1e-3)


def nearest(train: np.ndarray, test: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` training vectors (N, C) (or all, if fewer) nearest to each test vector (V, C); exact.

    All are float32 of nonzero norm. Returns rows of `train`, int64 (V, count), nearest first, and cosines, float32.
    """
    count = min(count, len(train))
    directions = normalize(torch.from_numpy(train), dim=1)
    chunks = [
        torch.topk(normalize(part, dim=1) @ directions.T, count, dim=1)
        for part in torch.split(torch.from_numpy(test), TEST_CHUNK)
    ]
    return torch.cat([each.indices for each in chunks]).numpy(), torch.cat([each.values for each in chunks]).numpy()


def knn_predictions(train: Features, test: Features, num_classes: int, config: KnnConfig) -> Predictions:
    """Predictions by the neighbours' votes; a class without votes is never a hit, even if it is among the top 5."""
    rows, cosines = nearest(train.vectors, test.vectors, config.neighbours)
    votes = np.zeros((len(test.labels), num_classes))
    # Weights are relative to the nearest neighbour's: exp(cosine / temperature) itself may overflow.
    weights = np.exp((cosines - cosines[:, :1]).astype(np.float64) / config.temperature)
    np.add.at(votes, (np.arange(len(votes))[:, None], train.labels[rows]), weights)
    predictions = predictions_from_scores(votes, test.labels)
    predictions.hits["top5"] &= (train.labels[rows] == test.labels[:, None]).any(axis=1)
    return predictions


def retrieval_predictions(train: Features, test: Features) -> Predictions:
    """Recall at 1, 5, 10, 20, 50: whether one of as many nearest training videos has the test video's class.

    Top-1 and top-5 are recall at 1 and 5; the predicted class is that of the nearest video.
    """
    rows, _ = nearest(train.vectors, test.vectors, max(RECALL_AT))
    labels = train.labels[rows]
    is_same_class = labels == test.labels[:, None]
    hits = {f"recall_at_{count}": is_same_class[:, :count].any(axis=1) for count in RECALL_AT}
    return Predictions({"top1": hits["recall_at_1"], "top5": hits["recall_at_5"], **hits}, labels[:, 0], test.labels)


def example_neighbours(train: Features, test: Features) -> list[Neighbours]:
    """Nearest training videos of a few test videos, evenly spaced in the set, whose order is random."""
    videos = np.unique(np.linspace(0, len(test.labels) - 1, NUM_EXAMPLES).round().astype(int))
    rows, cosines = nearest(train.vectors, test.vectors[videos], NUM_NEAREST)
    examples = zip(videos.tolist(), test.labels[videos].tolist(), rows, cosines, strict=True)
    return [
        Neighbours(video, label, near.tolist(), train.labels[near].tolist(), [float(f"{each:.4f}") for each in cosine])
        for video, label, near, cosine in examples
    ]

"""Contrastive and order losses of METHOD.md, section 4."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize


def key_similarities(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Dot products of queries (B, d) with their own keys (3, B, d): (3, B)."""
    return (queries * keys).sum(dim=2)


def inter_loss(similarities: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of 3B rows, each with one positive and the queue's negatives.

    `similarities` (3, B) are query·key of the three keys. The three rows of a query share `negatives` (B,), the
    log-sum-exp of query·negative/τ.
    """
    positives = similarities / temperature
    return (torch.logaddexp(positives, negatives) - positives).mean()


def intra_loss(similarities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of 2B rows: the first key against the second, and against the third; `similarities` is (3, B)."""
    first, *others = similarities / temperature
    return torch.stack([nn.functional.softplus(other - first) for other in others]).mean()


def order_loss(
    classifier: nn.Linear, query: torch.Tensor, second: torch.Tensor, third: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the order classifier on unit vectors (B, d) of three clips: whether the first clip is first."""
    joined = normalize(torch.cat([query, second, third], dim=1), dim=1)
    return cross_entropy(classifier(joined), labels)

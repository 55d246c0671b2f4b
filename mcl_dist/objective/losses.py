"""Contrastive and order losses of METHOD.md, section 4."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize


def own_similarities(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Dot products of queries (B, d) with their own keys (3, B, d): (3, B)."""
    return (queries * keys).sum(dim=2)


def inter_loss(own: torch.Tensor, against: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of 3B rows, one positive each, that share the queue's similarities.

    The negatives' log-sum-exp is one per query; the three rows of a video add their own positive to it.

    Args:
        own: (3, B), query·key for the three keys.
        against: (B,), log-sum-exp of query·queue/τ.
        temperature: τ.
    """
    positives = own / temperature
    return (torch.logaddexp(positives, against) - positives).mean()


def intra_loss(own: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of 2B rows: the first key against the second, then against the third; `own` is (3, B)."""
    first, *others = own / temperature
    return torch.stack([nn.functional.softplus(other - first) for other in others]).mean()


def order_loss(
    classifier: nn.Linear,
    query: torch.Tensor,
    second: torch.Tensor,
    third: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of telling whether the first clip came first, from unit vectors (B, d) of three clips."""
    joined = normalize(torch.cat([query, second, third], dim=1), dim=1)
    return cross_entropy(classifier(joined), labels)

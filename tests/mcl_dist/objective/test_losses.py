from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, normalize

from mcl_dist.objective.losses import inter_loss, intra_loss, key_similarities, order_loss
from mcl_dist.objective.negative_queue import NegativeQueue


def unit(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_inter_loss_equals_cross_entropy_over_all_rows_with_the_queue_repeated() -> None:
    query, keys, queue = unit(4, 8, seed=0), unit(3, 4, 8, seed=1), unit(10, 8, seed=2)
    query.requires_grad_()
    similarities = key_similarities(query, keys)
    loss = inter_loss(similarities, NegativeQueue(queue).log_sum_exp(query, 0.1), 0.1)
    logits = torch.cat([similarities.reshape(-1, 1), (query @ queue.T).repeat(3, 1)], dim=1) / 0.1
    expected = cross_entropy(logits, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, query, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_intra_loss_equals_cross_entropy_of_the_first_key_against_the_others() -> None:
    similarities = key_similarities(unit(4, 8, seed=0), unit(3, 4, 8, seed=1))
    logits = torch.cat([torch.stack([similarities[0], similarities[other]], dim=1) for other in (1, 2)]) / 0.1
    expected = cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(intra_loss(similarities, 0.1), expected, rtol=1e-12, atol=0)


def test_order_loss_classifies_the_normalised_concatenation_of_three_vectors() -> None:
    classifier = torch.nn.Linear(24, 2).double()
    vectors = [unit(4, 8, seed=seed) for seed in range(3)]
    labels = torch.tensor([0, 1, 1, 0])
    expected = cross_entropy(classifier(torch.cat(vectors, dim=1) / 3**0.5), labels)
    torch.testing.assert_close(order_loss(classifier, *vectors, labels), expected)

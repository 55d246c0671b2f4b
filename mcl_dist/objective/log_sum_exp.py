"""Log-sum-exp of similarities to many vectors and its gradient, in one pass that never materialises all similarities.

The gradient of log Σ exp(q·v/τ) with respect to q is the softmax-weighted mean of the vectors, divided by τ. The pass
is therefore attention with the vectors as keys and values: PyTorch's fused attention kernels compute it where they
support the inputs, and a chunked implementation elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Logits of a chunk: 4 MB in float32, which nearly fits in a core's cache and keeps a GPU busy.
CHUNK_LOGITS = 2**20
# A GPU has about a hundred multiprocessors, each of which takes a block of queries; splitting the vectors into parts
# makes enough blocks for all.
GPU_BLOCKS = 256
QUERIES_PER_BLOCK = 64


class LogSumExp(NamedTuple):
    """Log-sum-exp of M queries over a set of vectors.

    Attributes:
        value: (M,), log Σ_k exp(q·v_k/τ).
        mean: (M, d), softmax-weighted mean of the vectors; divided by τ, it is the gradient of `value`.
    """

    value: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def merge(cls, values: torch.Tensor, means: torch.Tensor) -> LogSumExp:
        """The log-sum-exp over the union of S disjoint sets, from their values (S, M) and means (S, M, d)."""
        value = torch.logsumexp(values, dim=0)
        return cls(value, ((values - value).exp().unsqueeze(2) * means).sum(dim=0))


LogSumExpKernel = Callable[[torch.Tensor, torch.Tensor, float], LogSumExp]


def log_sum_exp(queries: torch.Tensor, vectors: torch.Tensor, temperature: float) -> LogSumExp:
    """Log-sum-exp by the fused kernel where it supports the vectors, else in chunks; records no gradients.

    Queries are (M, d), vectors (N, d) with N at least 1, of the same dtype; the temperature is τ.
    """
    return (fused if has_fused_kernel(vectors) else chunked)(queries, vectors, temperature)


def has_fused_kernel(vectors: torch.Tensor) -> bool:
    """Whether PyTorch has a fused attention kernel for the vectors' device, dtype and width.

    The GPU kernel requires rows of a multiple of 16 bytes, and does not support float64.
    """
    if vectors.device.type == "cuda":
        return vectors.dtype != torch.float64 and vectors.shape[1] * vectors.element_size() % 16 == 0
    return vectors.device.type == "cpu"


@torch.no_grad()
def fused(queries: torch.Tensor, vectors: torch.Tensor, temperature: float) -> LogSumExp:
    """`log_sum_exp` by PyTorch's fused attention kernel for the device."""
    if vectors.device.type == "cpu":
        return LogSumExp(*(result[0] for result in _attention(queries, vectors[None], temperature)))
    num_parts = max(1, min(len(vectors), GPU_BLOCKS * QUERIES_PER_BLOCK // len(queries)))
    size = len(vectors) // num_parts
    parts = vectors[: size * num_parts].view(num_parts, size, -1)
    values, means = _attention(queries, parts, temperature)
    rest = vectors[size * num_parts :]
    if len(rest):
        values, means = map(torch.cat, zip((values, means), _attention(queries, rest[None], temperature), strict=True))
    return LogSumExp.merge(values, means)


@torch.no_grad()
def chunked(queries: torch.Tensor, vectors: torch.Tensor, temperature: float) -> LogSumExp:
    """`log_sum_exp` by matrix products over a few thousand vectors at a time."""
    scaled = queries / temperature
    largest = torch.full_like(scaled[:, 0], -torch.inf)
    total, weighted = torch.zeros_like(largest), torch.zeros_like(scaled)
    for chunk in torch.split(vectors, max(1, CHUNK_LOGITS // len(queries))):
        logits = scaled @ chunk.T
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        shrink = (before - largest).exp()
        weights = logits.sub_(largest[:, None]).exp_()
        total = total * shrink + weights.sum(dim=1)
        weighted = torch.addmm(weighted * shrink[:, None], weights, chunk)
    return LogSumExp(largest + total.log(), weighted / total[:, None])


def _attention(queries: torch.Tensor, parts: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exps (S, M) and weighted means (S, M, d) of queries (M, d) over each of the parts (S, N, d)."""
    keys = parts.unsqueeze(1)  # one head
    repeated = queries.expand(len(parts), 1, -1, -1)
    if parts.device.type == "cpu":
        means, values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            repeated, keys, keys, scale=1 / temperature
        )
    else:
        means, values, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            repeated, keys, keys, None, compute_log_sumexp=True, scale=1 / temperature
        )
    # The GPU kernel pads its log-sum-exps to whole blocks of queries.
    return values.reshape(len(parts), -1)[:, : len(queries)].to(queries.dtype), means[:, 0]

"""The reference of `mcl bench step`: parts of the training step, implemented directly from the formulas.

Training uses optimised implementations with the same results.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mcl_dist.model.encoder import IMAGENET_DEVIATION, IMAGENET_MEAN
from mcl_dist.model.network import NetworkOutput


def normalised(clips: torch.Tensor) -> torch.Tensor:
    """Clips from bytes (B, T, H, W, 3) to contiguous float32 (B, 3, T, H, W)."""
    mean, deviation = (torch.tensor(numbers, device=clips.device) for numbers in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return ((clips.float() / 255 - mean) / deviation).permute(0, 4, 1, 2, 3).contiguous()


def inter_loss(query: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy over 3B rows of 1 + K logits; each of the three keys repeats the negatives' logits.

    Shapes: query (B, d), keys (3, B, d), queue (K, d).
    """
    rows = []
    for key in keys:
        positive = (query * key).sum(dim=1, keepdim=True)
        rows.append(torch.cat([positive, query @ queue.T], dim=1) / temperature)
    logits = torch.cat(rows)
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def similarity_gradient(output: NetworkOutput, first_key: torch.Tensor) -> torch.Tensor:
    """Gradient of Σ query·first key with respect to the last projection, by autograd; itself differentiable."""
    similarity = (output.inter.vector * first_key).sum()
    (gradient,) = torch.autograd.grad(similarity, output.features.projected, create_graph=True)
    return gradient


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Update the moving average parameter by parameter."""
    for old, new in zip(average.parameters(), network.parameters(), strict=True):
        old.mul_(momentum).add_(new, alpha=1 - momentum)


@torch.no_grad()
def enqueue(queue: torch.Tensor, position: int, keys: torch.Tensor) -> int:
    """Write the keys (3, B, d) one by one; returns the next position."""
    for key in keys.flatten(0, 1):
        queue[position] = key
        position = (position + 1) % len(queue)
    return position

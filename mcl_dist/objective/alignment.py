"""Alignment of the inter similarity's gradient with the motion of the video (METHOD.md, sections 4 and 8)."""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool3d, cosine_similarity

from mcl_dist.model.batch_norm import REDUCED_AXES, batch_statistics, mean_over_ranks, per_channel
from mcl_dist.model.network import Network, NetworkOutput, at_least_float32

# The reference's eps: maps of similar views are products of tiny gradients.
_cosine = partial(cosine_similarity, dim=-1, eps=1e-12)


class Alignment(NamedTuple):
    """Similarity of maps (B, T, H, W) to targets of the same shape.

    Attributes:
        loss: scalar, the sum of 1 − similarity over the three, mean over the batch.
        spatiotemporal, spatial, temporal: (B,), cosine similarities.
    """

    loss: torch.Tensor
    spatiotemporal: torch.Tensor
    spatial: torch.Tensor
    temporal: torch.Tensor


def similarity_gradient(network: Network, output: NetworkOutput, first_key: torch.Tensor) -> torch.Tensor:
    """Gradient of Σ query·first_key with respect to `EncoderOutput.projected`, in closed form.

    The sum is over all clips that BatchNorm normalises together. Differentiable by plain operations, so that one
    backward pass suffices (METHOD.md, section 8).

    Args:
        network: the query network, its BatchNorm in training mode.
        output: of the network, with its autograd graph.
        first_key: (B, d), unit vectors, constant.

    Returns:
        (B, C, T', H', W') in float32 or wider.
    """
    head, features = output.inter, output.features
    query, key = head.vector, at_least_float32(first_key)
    away_from_query = key - query * (query * key).sum(dim=1, keepdim=True)
    d_projected = away_from_query / head.projected.norm(dim=1, keepdim=True)
    d_hidden = (d_projected @ at_least_float32(network.inter.second.weight)) * (head.hidden > 0)
    d_pooled = d_hidden @ at_least_float32(network.inter.first.weight)
    positions = features.summed[0, 0].numel()
    d_summed = (d_pooled / positions)[:, :, None, None, None] * (features.summed > 0)
    return _through_batch_norm(network.encoder.last_norm, at_least_float32(features.projected), d_summed)


def automatic_gradient(output: NetworkOutput, first_key: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """`similarity_gradient` with respect to any activation behind `output`, by automatic differentiation.

    Its own gradient is a second backward pass, which compilation and synchronised BatchNorm do not support.
    """
    similarity = (output.inter.vector * at_least_float32(first_key)).sum()
    (gradient,) = torch.autograd.grad(similarity, activation, create_graph=True)
    return at_least_float32(gradient)


def _through_batch_norm(norm: torch.nn.BatchNorm3d, inputs: torch.Tensor, d_outputs: torch.Tensor) -> torch.Tensor:
    """BatchNorm's backward, differentiable, over the clips that it normalised together: this rank's or all ranks'."""
    mean, variance = (per_channel(values) for values in batch_statistics(norm, inputs))
    inverse_deviation = torch.rsqrt(variance + norm.eps)
    normalised = (inputs - mean) * inverse_deviation
    local_means = torch.stack([d_outputs.mean(dim=REDUCED_AXES), (d_outputs * normalised).mean(dim=REDUCED_AXES)])
    shift, along = (per_channel(values) for values in mean_over_ranks(norm, local_means))
    scale = per_channel(at_least_float32(norm.weight)) * inverse_deviation
    return scale * (d_outputs - shift - normalised * along)


def alignment_map(gradient_bcthw: torch.Tensor) -> torch.Tensor:
    """Sum over channels, each weighted per frame by its spatial mean, then ReLU: (B, T, H, W)."""
    channel_weights = gradient_bcthw.mean(dim=(3, 4), keepdim=True)
    return torch.relu((channel_weights * gradient_bcthw).sum(dim=1))


def align(maps: torch.Tensor, targets: torch.Tensor) -> Alignment:
    """Compare maps with motion targets (B, T, H, W) in space-time, in space, and in time.

    Maps of a finer grid, from earlier layers, are averaged down to the targets' grid.
    """
    if maps.shape != targets.shape:
        _, frames, height, width = targets.shape
        maps = adaptive_avg_pool3d(maps, (frames, height, width))
    frame_weights = torch.softmax(targets.sum(dim=(2, 3)), dim=1)
    per_frame = _cosine(maps.flatten(2), targets.flatten(2))
    spatiotemporal = (frame_weights * per_frame).sum(dim=1)
    spatial = _cosine(maps.mean(dim=1).flatten(1), targets.mean(dim=1).flatten(1))
    temporal = _cosine(maps.sum(dim=(2, 3)), targets.sum(dim=(2, 3)))
    loss = (3 - spatiotemporal - spatial - temporal).mean()
    return Alignment(loss, spatiotemporal, spatial, temporal)

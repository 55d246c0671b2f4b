"""The network of METHOD.md, section 3: encoder, three projection heads and the order classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from mcl_dist.config import number
from mcl_dist.model.encoder import Encoder, EncoderConfig, EncoderOutput


@dataclass(frozen=True)
class HeadsConfig:
    """Size of the projection heads; `dim` is d of METHOD.md."""

    dim: int = number(128, minimum=2)


class HeadOutput(NamedTuple):
    """A head's path from hidden layer to unit vector.

    Attributes:
        hidden: (B, H), before the ReLU.
        projected: (B, d), before normalisation.
        vector: (B, d), unit length.
    """

    hidden: torch.Tensor
    projected: torch.Tensor
    vector: torch.Tensor


class NetworkOutput(NamedTuple):
    """Features of a batch of clips with the three heads' answers."""

    features: EncoderOutput
    inter: HeadOutput
    intra: HeadOutput
    order: HeadOutput


class Head(nn.Module):
    """Two linear layers with a ReLU between, then normalisation, in float32 or wider."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, dim)

    def forward(self, pooled: torch.Tensor) -> HeadOutput:
        """Project pooled features (B, C)."""
        hidden = self.first(pooled)
        projected = widened(self.second(torch.relu(hidden)))
        return HeadOutput(hidden, projected, normalize(projected, dim=1))


class Network(nn.Module):
    """Encoder and heads; query and key side have one each."""

    def __init__(self, encoder: EncoderConfig, heads: HeadsConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        features = self.encoder.feature_dim
        self.inter = Head(features, heads.dim)
        self.intra = Head(features, heads.dim)
        self.order = Head(features, heads.dim)
        self.order_classifier = nn.Linear(3 * heads.dim, 2)

    def forward(self, clips_bcthw: torch.Tensor) -> NetworkOutput:
        """Encode and project normalised clips (B, 3, T, H, W)."""
        features = self.encoder(clips_bcthw)
        pooled = features.pooled
        return NetworkOutput(features, self.inter(pooled), self.intra(pooled), self.order(pooled))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: cosines and cross-entropies are not left to autocast."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""The network of METHOD.md, section 3: encoder, three projection heads and the order classifier."""

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
    """Activations of a head.

    Attributes:
        hidden: (B, H), before the ReLU.
        projected: (B, d), before normalisation.
        vector: (B, d), unit length.
    """

    hidden: torch.Tensor
    projected: torch.Tensor
    vector: torch.Tensor


class NetworkOutput(NamedTuple):
    """Features of a batch of clips, and the outputs of the three heads."""

    features: EncoderOutput
    inter: HeadOutput
    intra: HeadOutput
    order: HeadOutput


class Head(nn.Module):
    """Two linear layers with a ReLU between, then normalisation in at least float32."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, dim)

    def forward(self, pooled: torch.Tensor) -> HeadOutput:
        """Project pooled features (B, C)."""
        hidden = self.first(pooled)
        projected = at_least_float32(self.second(torch.relu(hidden)))
        return HeadOutput(hidden, projected, normalize(projected, dim=1))


class Network(nn.Module):
    """Encoder and heads; the query side and the key side each have one."""

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


class LossModule(nn.Module):
    """A network and the loss to minimise, which the engine optimises; the forward returns the loss as one scalar.

    Attributes:
        network: its parameters are optimised.
        report: detached scalars of the last forward by name, including `loss`, the one that it returned.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.report: dict[str, torch.Tensor] = {}


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float32 if narrower: autocast must not reach cosines and cross-entropies."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

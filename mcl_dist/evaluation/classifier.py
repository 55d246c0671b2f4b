"""Classifiers: a linear layer on features, or on an encoder that learns with it (METHOD.md, section 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mcl_dist.model.encoder import Encoder
from mcl_dist.model.loss_module import LossModule
from mcl_dist.model.network import widened

INITIAL_DEVIATION = 0.01  # of the linear layer's weights, as the reference's; its biases start at 0


class LinearLayer(nn.Module):
    """Features (B, C) to scores (B, classes)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes)
        nn.init.normal_(self.linear.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of features, of which `kept` of `draw_kept` leaves some out."""
        scores: torch.Tensor = self.linear(features if kept is None else features * kept)
        return scores


class Classifier(LinearLayer):
    """Normalised clips (B, 3, T, H, W) to scores (B, classes)."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__(encoder.feature_dim, num_classes)
        self.encoder = encoder

    def forward(self, clips: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the clips' pooled features, of which `kept` leaves some out."""
        return super().forward(self.encoder(clips).pooled, kept)


class ClassifierLoss(LossModule):
    """The cross-entropy of a classifier.

    Attributes:
        report: also has the share of the clips whose highest score is that of their class.
    """

    def __init__(self, network: LinearLayer, *, autocast: bool = False) -> None:
        super().__init__(network)
        self._autocast = autocast

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over B inputs of the network, with labels int64 (B,)."""
        scores = self.scores(inputs, kept)
        loss = cross_entropy(scores, labels)
        hits = (scores.detach().argmax(dim=1) == labels).float().mean()
        self.report = {"loss": loss.detach(), "accuracy": hits}
        return loss

    def scores(self, inputs: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """What the network gives, in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._autocast):
            scores = self.network(inputs, kept)
        return widened(scores)


def draw_kept(num_videos: int, features: int, dropout: float, *, seed: int, step: int) -> torch.Tensor:
    """Dropout of a step's global batch, float32 (G, C): 0 for what is left out, 1 / (1 - dropout) for the rest.

    A function of seed and step: no generator has to be saved, and ranks that take their rows of it drop the same
    features whatever their number.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    kept = generator.random((num_videos, features), dtype=np.float32) >= dropout
    return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - dropout))

"""Classifiers: a linear layer on frozen features or on a fine-tuned encoder (METHOD.md, section 6)."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mcl_dist.model.encoder import Encoder
from mcl_dist.model.network import LossModule, at_least_float32

INITIAL_DEVIATION = 0.01  # of the linear layer's weights, as in the reference; biases start at 0


class LinearLayer(nn.Module):
    """Features (B, C) to scores (B, classes)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes)
        nn.init.normal_(self.linear.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of features, multiplied by the `dropout_mask` if one is given."""
        scores: torch.Tensor = self.linear(features if mask is None else features * mask)
        return scores


class Classifier(LinearLayer):
    """Normalised clips (B, 3, T, H, W) to scores (B, classes)."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__(encoder.feature_dim, num_classes)
        self.encoder = encoder

    def forward(self, clips_bcthw: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the clips' pooled features, multiplied by the `dropout_mask` if one is given."""
        return super().forward(self.encoder(clips_bcthw).pooled, mask)


class ClassifierLoss(LossModule):
    """Cross-entropy of a classifier.

    Attributes:
        report: `loss`, and `accuracy`: the share of clips whose highest score is that of their class.
    """

    def __init__(self, network: LinearLayer, *, autocast: bool = False) -> None:
        super().__init__(network)
        self._autocast = autocast

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy of B inputs with labels int64 (B,)."""
        scores = self.scores(inputs, mask)
        loss = cross_entropy(scores, labels)
        accuracy = (scores.detach().argmax(dim=1) == labels).float().mean()
        self.report = {"loss": loss.detach(), "accuracy": accuracy}
        return loss

    def scores(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The network's scores (B, classes) in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._autocast):
            scores = self.network(inputs, mask)
        return at_least_float32(scores)


def dropout_mask(num_videos: int, features: int, dropout: float, *, seed: int, step: int) -> torch.Tensor:
    """Dropout mask of a step's global batch, float32 (G, C): 0 for dropped features, 1 / (1 - dropout) for others.

    A function of seed and step: checkpoints need no generator state, and ranks that take their rows of it drop the same
    features whatever their number.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    kept = generator.random((num_videos, features), dtype=np.float32) >= dropout
    return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - dropout))

"""Features of a frozen encoder: one vector a video, the mean over its clips (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mcl_dist.encoder import Encoder, normalise

# Clips that go through the encoder at once: 16 of 16×224² keep R(2+1)D-50 under 2 GB of activations.
CLIPS_AT_ONCE = 16


class Features(NamedTuple):
    """What a probe learns from or is tested on.

    Attributes:
        vectors: float32 (videos, C).
        labels: int64 (videos,).
    """

    vectors: np.ndarray
    labels: np.ndarray


@torch.no_grad()
def extract_features(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Features:
    """Encode every video's clips with the encoder in evaluation mode, and average.

    Args:
        encoder: left in evaluation mode.
        batches: clips uint8 (V, clips of a video, T, H, W, 3) with labels (V,).
    """
    encoder.eval()
    vectors, labels = [], []
    for clips, labels_v in batches:
        num_videos, num_clips = clips.shape[:2]
        parts = torch.split(clips.flatten(0, 1), CLIPS_AT_ONCE)
        pooled = torch.cat([encoder(normalise(part)).pooled for part in parts])
        vectors.append(pooled.view(num_videos, num_clips, -1).mean(dim=1).float().cpu().numpy())
        labels.append(labels_v.cpu().numpy())
    if not vectors:
        return Features(np.empty((0, encoder.feature_dim), np.float32), np.empty(0, np.int64))
    return Features(np.concatenate(vectors), np.concatenate(labels))


@torch.no_grad()
def recalibrate(encoder: Encoder, clip_batches: Iterable[torch.Tensor]) -> None:
    """Set BatchNorm's statistics to the plain average over these batches; no parameter changes.

    An untrained encoder normalises with a mean of 0 and a variance of 1 that its activations do not have;
    compared with a trained one it would lose for that alone.

    Args:
        encoder: left in evaluation mode.
        clip_batches: uint8 (B, T, H, W, 3) each, of training videos.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's sign for a cumulative average
    encoder.train()
    for clips in clip_batches:
        encoder(normalise(clips))
    encoder.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum

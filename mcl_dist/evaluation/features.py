"""Features of a frozen encoder: one vector a video, the mean over its clips (METHOD.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, normalise

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


def share_of(num_videos: int, group: ProcessGroup) -> range:
    """The contiguous share of a set's positions that this rank looks at; shares differ by one video at most."""
    return range(num_videos * group.rank // group.size, num_videos * (group.rank + 1) // group.size)


def extract_features(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Features:
    """Encode every video's clips with the encoder in evaluation mode, and average.

    A video goes through the encoder alone, so that its feature does not depend on which others a rank has.

    Args:
        encoder: left in evaluation mode.
        batches: as of `mean_over_clips`.
    """
    encoder.eval()

    def pooled(clips: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = encoder(normalise(clips)).pooled
        return features

    return mean_over_clips(pooled, encoder.feature_dim, batches)


@torch.no_grad()
def mean_over_clips(
    function: Callable[[torch.Tensor], torch.Tensor], width: int, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Features:
    """One vector a video, the mean of what a function gives for its clips.

    Args:
        function: bytes (clips, T, H, W, 3) to vectors (clips, width).
        width: of the vectors.
        batches: clips uint8 (V, clips of a video, T, H, W, 3) with labels (V,).
    """
    vectors, labels = [], []
    for clips, labels_v in batches:
        vectors += [_mean(function, video) for video in clips]
        labels.append(labels_v.cpu().numpy())
    if not vectors:
        return Features(np.empty((0, width), np.float32), np.empty(0, np.int64))
    return Features(torch.stack(vectors).cpu().numpy(), np.concatenate(labels))


def check_finite(features: Features, name_of: Callable[[int], str]) -> None:
    """See that every vector can be compared; with one that cannot, a probe's score would be wrong and look right.

    Args:
        features: of some videos.
        name_of: their places to their names.

    Raises:
        UserError: naming the first video whose vector is not finite.
    """
    wrong = np.flatnonzero(~np.isfinite(features.vectors).all(axis=1))
    if len(wrong):
        raise UserError(
            f"{name_of(int(wrong[0]))}: what the encoder gives for it is not finite, nor for {len(wrong) - 1} more of "
            f"{len(features.labels)} videos; the training has diverged, name an earlier checkpoint"
        )


def gather_features(own: Features, num_videos: int, group: ProcessGroup) -> Features:
    """The features of all ranks' shares (`share_of`), in the set's order, on every rank.

    An exchange wants as many rows of every rank: shorter shares are filled up for it, and the filling is dropped.
    """
    if group.size == 1:
        return own
    longest = -(-num_videos // group.size)
    missing = longest - len(own.labels)
    vectors = group.gather(torch.from_numpy(np.pad(own.vectors, ((0, missing), (0, 0)))))
    labels = group.gather(torch.from_numpy(np.pad(own.labels, (0, missing), constant_values=-1)))
    real = labels >= 0
    return Features(vectors[real].cpu().numpy(), labels[real].cpu().numpy())


def _mean(function: Callable[[torch.Tensor], torch.Tensor], clips: torch.Tensor) -> torch.Tensor:
    """(C,) of one video's clips (clips, T, H, W, 3)."""
    parts = torch.split(clips, CLIPS_AT_ONCE)
    return torch.cat([function(part) for part in parts]).mean(dim=0).float()


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

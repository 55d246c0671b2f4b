"""Features of a frozen encoder: one vector per video, the mean over its clips (METHOD.md, section 6)."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.model.encoder import Encoder, normalise

MAX_CLIPS = 16  # per forward: 16 clips of 16×224² keep the activations of R(2+1)D-50 below 2 GB


class Features(NamedTuple):
    """Features of a set of videos with their labels.

    Attributes:
        vectors: float32 (videos, C).
        labels: int64 (videos,).
    """

    vectors: np.ndarray
    labels: np.ndarray


def rank_range(num_videos: int, group: ProcessGroup) -> range:
    """This rank's contiguous range of a set's positions; ranges differ in length by one video at most."""
    return range(num_videos * group.rank // group.size, num_videos * (group.rank + 1) // group.size)


def extract_features(encoder: Encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Features:
    """Encode every video's clips with the encoder in evaluation mode, and average.

    Every video has its own forward, so that its feature does not depend on the rank's other videos. The encoder stays
    in evaluation mode; `batches` is as in `mean_over_clips`.
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
    """One vector per video: the mean of a function's results for its clips.

    Args:
        function: uint8 clips (clips, T, H, W, 3) to vectors (clips, width).
        width: of the vectors.
        batches: uint8 clips (V, clips per video, T, H, W, 3) with labels (V,).
    """
    vectors, labels = [], []
    for clips, labels_v in batches:
        per_clip = (torch.cat([function(part) for part in torch.split(video, MAX_CLIPS)]) for video in clips)
        vectors += [of_clips.mean(dim=0).float() for of_clips in per_clip]
        labels.append(labels_v.cpu().numpy())
    if not vectors:
        return Features(np.empty((0, width), np.float32), np.empty(0, np.int64))
    return Features(torch.stack(vectors).cpu().numpy(), np.concatenate(labels))


def check_finite(features: Features, name_of: Callable[[int], str]) -> None:
    """Check that every vector is finite; otherwise a probe's score would be plausible and wrong.

    Raises:
        UserError: a vector is not finite; names the first such video by `name_of` its row.
    """
    rows = np.flatnonzero(~np.isfinite(features.vectors).all(axis=1))
    if len(rows):
        raise UserError(
            f"{name_of(int(rows[0]))}: its feature is not finite, like those of {len(rows) - 1} more of "
            f"{len(features.labels)} videos; the training has diverged: choose an earlier checkpoint"
        )


def gather_features(own: Features, num_videos: int, group: ProcessGroup) -> Features:
    """Features of the whole set, in its order, on every rank, from those of each rank's `rank_range`.

    Ranks with fewer videos pad their rows, because a gather needs equally many from every rank; the padding is dropped.
    """
    if group.size == 1:
        return own
    longest = -(-num_videos // group.size)
    missing = longest - len(own.labels)
    vectors = group.gather(torch.from_numpy(np.pad(own.vectors, ((0, missing), (0, 0)))))
    labels = group.gather(torch.from_numpy(np.pad(own.labels, (0, missing), constant_values=-1)))
    is_video = labels >= 0
    return Features(vectors[is_video].cpu().numpy(), labels[is_video].cpu().numpy())


@torch.no_grad()
def recalibrate(encoder: Encoder, clip_batches: Iterable[torch.Tensor]) -> None:
    """Set BatchNorm's running statistics to their average over batches of clips; no parameter changes.

    An untrained encoder normalises by a mean of 0 and a variance of 1, which its activations do not have. That alone
    would make it worse than a trained one.

    Args:
        encoder: stays in evaluation mode.
        clip_batches: uint8 (B, T, H, W, 3) each, of training videos.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average, in PyTorch's convention
    encoder.train()
    for clips in clip_batches:
        encoder(normalise(clips))
    encoder.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum

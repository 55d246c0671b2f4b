"""The method: encoder, objective, training loop, checkpoints, evaluation; knows no data format, no reporter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mcl_dist.model.encoder import Encoder


def load_encoder(path: str) -> Encoder:
    """An encoder in evaluation mode, from a run folder, a `step-…` folder or a weights file.

    It takes what `normalise` makes of clips; `.pooled` of its answer are the features (B, C).
    Errors as of `mcl_dist.checkpoint.interchange.load_encoder`.
    """
    from mcl_dist.checkpoint.interchange import load_encoder as load

    return load(path)


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """Bytes (B, T, H, W, 3) to what an encoder takes, float32 (B, 3, T, H, W)."""
    from mcl_dist.model.encoder import normalise as ours

    return ours(clips)

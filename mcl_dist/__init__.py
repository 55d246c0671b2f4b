"""The method: encoder, objective, training loop, checkpoints, evaluation. Independent of data formats and reporters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mcl_dist.model.encoder import Encoder


def load_encoder(path: str) -> Encoder:
    """An encoder in evaluation mode, from a run folder, a `step-…` folder or a weights file.

    It takes clips that `normalise` returns; `.pooled` of its output holds the features (B, C).
    Errors as in `mcl_dist.checkpoint.interchange.load_encoder`.
    """
    from mcl_dist.checkpoint.interchange import load_encoder as load

    return load(path)


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """Clips of bytes (B, T, H, W, 3) to the encoder's input, float32 (B, 3, T, H, W)."""
    from mcl_dist.model.encoder import normalise as normalise_clips

    return normalise_clips(clips)

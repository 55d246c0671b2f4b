"""Features kept on a local disk by what they are made of, so that a second look at them costs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes
from torch import nn

from mcl_dist.errors import UserError
from mcl_dist.evaluation.features import Features
from mcl_dist.storage.folder import Folder

FORMAT = 1  # of the files, and of how features are made


@dataclass(frozen=True)
class FeaturesConfig:
    """Whether and where features are kept.

    Attributes:
        keep: read them from the folder, and write them to it.
        folder: a local one; nothing in it is ever deleted.
    """

    keep: bool = True
    folder: str = "~/.cache/mcl-dist/features"


class FeatureCache:
    """Features by what they are made of: encoder, videos, clips."""

    def __init__(self, config: FeaturesConfig) -> None:
        self._folder = Folder(str(Path(config.folder).expanduser())) if config.keep else None

    def read(self, made_of: Mapping[str, Any]) -> tuple[Features | None, str]:
        """The features, if they are kept, and a line that says what was found.

        A file that is not what was written counts as none, and is written anew.
        """
        name = _name(made_of)
        if self._folder is None or not self._folder.exists(name):
            return None, ""
        where = f"{self._folder.url}/{name}"
        try:
            tensors = from_bytes(self._folder.read(name))
            features = Features(tensors["vectors"], tensors["labels"])
            if bytes(tensors["sha256"]) != _seal(features):
                raise ValueError("its digest is another")
        except Exception as error:  # safetensors has errors of its own for what is no such file
            return None, f"{where}: not what was kept ({error}); made anew"
        return features, f"taken from {where}"

    def write(self, made_of: Mapping[str, Any], features: Features) -> str:
        """Keep features; returns a line that says so, or why they could not be kept: they are at hand all the same."""
        if self._folder is None:
            return ""
        name = _name(made_of)
        tensors = {**features._asdict(), "sha256": np.frombuffer(_seal(features), np.uint8)}
        try:
            self._folder.write(name, to_bytes(tensors, {"made_of": json.dumps(made_of, sort_keys=True)}))
        except UserError as error:
            return f"not kept ({error})"
        return f"kept in {self._folder.url}/{name}"


def digest_of(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names: what a module computes, whatever file it came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _name(made_of: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **made_of}, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _seal(features: Features) -> bytes:
    return hashlib.sha256(features.vectors.tobytes() + features.labels.tobytes()).digest()

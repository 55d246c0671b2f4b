"""Cache of features on a local disk, with what they are computed from as the key."""

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

FORMAT = 1  # of the files and of the computation of features


@dataclass(frozen=True)
class FeaturesConfig:
    """Cache of features.

    Attributes:
        keep: read features from the folder, and write them to it.
        folder: on a local disk; nothing in it is ever deleted.
    """

    keep: bool = True
    folder: str = "~/.cache/mcl-dist/features"


class FeatureCache:
    """Features by key: the encoder, videos and clips that they are computed from."""

    def __init__(self, config: FeaturesConfig) -> None:
        self._folder = Folder(str(Path(config.folder).expanduser())) if config.keep else None

    def read(self, made_of: Mapping[str, Any]) -> tuple[Features | None, str]:
        """The features if they are cached, and a line about them; a corrupt file counts as a miss."""
        name = _name(made_of)
        if self._folder is None or not self._folder.exists(name):
            return None, ""
        where = f"{self._folder.url}/{name}"
        try:
            tensors = from_bytes(self._folder.read(name))
            features = Features(tensors["vectors"], tensors["labels"])
            if bytes(tensors["sha256"]) != _digest(features):
                raise ValueError("wrong digest")
        except Exception as error:  # safetensors has its own errors for corrupt files
            return None, f"{where}: corrupt ({error}); computing the features again"
        return features, f"read from {where}"

    def write(self, made_of: Mapping[str, Any], features: Features) -> str:
        """Cache features; returns a line on where they are, or on why they could not be written."""
        if self._folder is None:
            return ""
        name = _name(made_of)
        tensors = {**features._asdict(), "sha256": np.frombuffer(_digest(features), np.uint8)}
        try:
            self._folder.write(name, to_bytes(tensors, {"made_of": json.dumps(made_of, sort_keys=True)}))
        except UserError as error:
            return f"not cached ({error})"
        return f"cached in {self._folder.url}/{name}"


def module_digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names; independent of the file that they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _name(made_of: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **made_of}, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _digest(features: Features) -> bytes:
    return hashlib.sha256(features.vectors.tobytes() + features.labels.tobytes()).digest()

"""The encoder that is evaluated or exported, and the clips that it was trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mcl_dist.errors import ConfigError

if TYPE_CHECKING:
    from dataloading.loader.probe_clips import ClipGeometry, ClipsConfig
    from launch.run.config import PretrainConfig
    from mcl_dist.model.encoder import Encoder

RANDOM = "random"
FRAMES, STRIDE, CROP = 16, 2, 224  # METHOD.md's, for weights files that store no clip settings
# Required keys that do not affect the encoder: a configuration may leave them to the command line.
UNUSED_KEYS = ("data.train=''", "run.dir=''")


@dataclass(frozen=True)
class EncoderUnderTest:
    """The encoder of an evaluation, on the CPU, and the geometry of the clips of its pre-training."""

    name: str  # as on the command line
    encoder: Encoder
    geometry: ClipGeometry
    is_untrained: bool = False  # the start of a pre-training run

    def clip_geometry(self, clips: ClipsConfig) -> ClipGeometry:
        """Shape of the clips of an evaluation: the configured values, else those of the pre-training."""
        configured = {"frames": clips.frames, "stride": clips.stride, "crop": clips.crop}
        return replace(self.geometry, **{name: value for name, value in configured.items() if value is not None})

    def needs_recalibration(self, requested: bool | None) -> bool:
        """Whether to measure BatchNorm's statistics on training clips: as requested, by default if untrained."""
        return self.is_untrained if requested is None else requested


def resolve_checkpoint(checkpoint: str) -> str:
    """The `step-…` URL of a run's newest good checkpoint; a weights file and `random` stay as they are.

    All ranks and splits then load the same checkpoint while the run writes new ones. A warning names each newer
    checkpoint that is damaged; a UserError means that there is no such checkpoint.
    """
    from mcl_dist.checkpoint import resolve
    from mcl_dist.checkpoint.interchange import is_weights_file
    from mcl_dist.storage.store_requests import without_credentials

    if checkpoint == RANDOM or is_weights_file(checkpoint):
        return checkpoint
    url, refused = resolve(checkpoint)
    for damaged in refused:
        print(without_credentials(f"mcl: {damaged.url}: {damaged.reason}; using {url} instead"), file=sys.stderr)
    return url


def load_encoder_under_test(checkpoint: str, pretrain: PretrainConfig | None = None) -> EncoderUnderTest:
    """Load the encoder of a checkpoint, or build the one that a pre-training run starts from.

    `checkpoint` is as for `mcl_dist.load_encoder`, or `random`, which means the start of the run `pretrain`.

    Raises:
        ConfigError: `random` without a pre-training configuration.
        UserError: no such checkpoint.
    """
    from dataloading.loader.probe_clips import ClipGeometry
    from launch.run.config import PretrainConfig
    from mcl_dist.checkpoint import interchange, load_encoder
    from mcl_dist.config import build_config

    if checkpoint == RANDOM:
        if pretrain is None:
            raise ConfigError(
                f"--checkpoint {RANDOM}: needs a pre-training configuration; name it with --pretrain FILE"
            )
        return _untrained(pretrain)
    if interchange.is_weights_file(checkpoint):
        encoder = interchange.load_encoder(checkpoint)  # first: it reports a file that cannot be read
        clips = interchange.read_clip_settings(checkpoint) or {"frames": FRAMES, "stride": STRIDE, "crop": CROP}
        return EncoderUnderTest(checkpoint, encoder, ClipGeometry(**clips))
    encoder, stored = load_encoder(checkpoint)
    data = build_config(PretrainConfig, stored).data
    return EncoderUnderTest(checkpoint, encoder, ClipGeometry(data.frames, data.stride, data.crop))


def load_pretrain_config(file: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Load the pre-training configuration of an encoder; errors as in `load_config`."""
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    return load_config(PretrainConfig, file, [*UNUSED_KEYS, *overrides])


def _untrained(config: PretrainConfig) -> EncoderUnderTest:
    from dataloading.loader.probe_clips import ClipGeometry
    from launch.run.parts import build_initial_network

    network, _ = build_initial_network(config.run.seed, config.encoder, config.heads, config.initial)
    geometry = ClipGeometry(config.data.frames, config.data.stride, config.data.crop)
    return EncoderUnderTest(RANDOM, network.encoder, geometry, is_untrained=True)

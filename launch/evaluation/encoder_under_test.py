"""What is evaluated or exported: an encoder, and the clips that it was made for."""

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
FRAMES, STRIDE, CROP = 16, 2, 224  # METHOD.md's, for weights that do not tell
# Sets and run folder are no matter of the encoder: a configuration may leave them to the command line.
NEEDLESS = ("data.train=''", "run.dir=''")


@dataclass(frozen=True)
class EncoderUnderTest:
    """What is evaluated.

    Attributes:
        name: as the command line has it.
        encoder: on the CPU.
        geometry: of the clips of its pre-training.
        is_untrained: whether it has learnt nothing yet.
    """

    name: str
    encoder: Encoder
    geometry: ClipGeometry
    is_untrained: bool = False

    def shown(self, clips: ClipsConfig) -> ClipGeometry:
        """The shape of the clips that an evaluation shows it."""
        wanted = {"frames": clips.frames, "stride": clips.stride, "crop": clips.crop}
        return replace(self.geometry, **{name: value for name, value in wanted.items() if value is not None})


def settled(checkpoint: str) -> str:
    """What a name stands for now, so that all ranks and splits load the same however a run goes on meanwhile.

    The newest good `step-…` folder of a run, told where a newer one is damaged; a file and `random` as they are.

    Raises:
        UserError: no such checkpoint.
    """
    from mcl_dist.checkpoint import resolve
    from mcl_dist.checkpoint.interchange import is_file
    from mcl_dist.storage.store_requests import without_credentials

    if checkpoint == RANDOM or is_file(checkpoint):
        return checkpoint
    url, refused = resolve(checkpoint)
    for damage in refused:
        told = without_credentials(f"mcl: {damage.url}: {damage.reason}; {url} is taken instead")
        print(told, file=sys.stderr)
    return url


def load_subject(checkpoint: str, pretrain: PretrainConfig | None = None) -> EncoderUnderTest:
    """The encoder of a checkpoint, or the one that a pre-training run starts from.

    Args:
        checkpoint: as for `mcl_dist.load_encoder`, or `random`.
        pretrain: the run whose start `random` is.

    Raises:
        ConfigError: `random` without a pre-training configuration.
        UserError: no such checkpoint.
    """
    from dataloading.loader.probe_clips import ClipGeometry
    from launch.run.config import PretrainConfig
    from mcl_dist.checkpoint import load_encoder
    from mcl_dist.checkpoint.interchange import clips_of_file, is_file
    from mcl_dist.checkpoint.interchange import load_encoder as load_weights
    from mcl_dist.config import build_config

    if checkpoint == RANDOM:
        if pretrain is None:
            raise ConfigError(
                "--checkpoint random: say which encoder with --pretrain FILE, a pre-training configuration"
            )
        return EncoderUnderTest(RANDOM, _untrained(pretrain), _geometry(pretrain), is_untrained=True)
    if is_file(checkpoint):
        encoder = load_weights(checkpoint)
        clips = clips_of_file(checkpoint) or {"frames": FRAMES, "stride": STRIDE, "crop": CROP}
        return EncoderUnderTest(checkpoint, encoder, ClipGeometry(**clips))
    encoder, stored = load_encoder(checkpoint)
    data = build_config(PretrainConfig, stored).data
    return EncoderUnderTest(checkpoint, encoder, ClipGeometry(data.frames, data.stride, data.crop))


def load_pretrain_config(file: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """A pre-training configuration whose encoder is wanted; errors as of `load_config`."""
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    return load_config(PretrainConfig, file, [*NEEDLESS, *overrides])


def _untrained(config: PretrainConfig) -> Encoder:
    import torch

    from mcl_dist.model.network import Network
    from mcl_dist.model.pretrained_weights import initialise

    torch.manual_seed(config.run.seed)
    network = Network(config.encoder, config.heads)
    initialise(network, config.initial)
    return network.encoder


def _geometry(config: PretrainConfig) -> ClipGeometry:
    from dataloading.loader.probe_clips import ClipGeometry

    return ClipGeometry(config.data.frames, config.data.stride, config.data.crop)

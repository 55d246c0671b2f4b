"""R(2+1)D residual encoders of METHOD.md, section 3: R(2+1)D-50, and narrower and shallower ones.

Attribute names are those of the 2-D ResNet that it is inflated from, so that weights of both load by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mcl_dist.config import choice, number
from mcl_dist.model.activation_checkpointing import checkpoint_activations
from mcl_dist.model.batch_norm import SynchronizedBatchNorm3d

EXPANSION = 4  # output channels of a bottleneck over inner channels, as in ResNet-50
STEM_STRIDE = (4, 2, 2)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderConfig:
    """Size of the encoder; the defaults are R(2+1)D-50.

    Attributes:
        width: channels of the stem; each stage's bottlenecks are twice as wide as those of the stage before.
        blocks: bottlenecks per stage.
        batch_norm: which clips BatchNorm normalises together. `shuffled`: for queries those of a rank; for keys equally
            many from all ranks, shuffled every step. `synchronized`: those of all ranks, for both. `local`: those of a
            rank, for both.
        checkpointing: activation checkpointing of every bottleneck: less memory, more time.
    """

    width: int = number(64, minimum=1)
    blocks: tuple[int, ...] = field(default=(3, 4, 6, 3), metadata={"minimum": 1})
    batch_norm: str = choice("shuffled", "synchronized", "local")
    checkpointing: bool = False

    def grid(self, frames: int, crop: int) -> tuple[int, int, int]:
        """(T', H', W') of the feature map for clips of `frames` × `crop` × `crop`."""
        side = crop
        for _ in range(len(self.blocks) + 1):  # stem, pooling and every stage but the first halve the side
            side = -(-side // 2)
        return frames // STEM_STRIDE[0], side, side


class EncoderOutput(NamedTuple):
    """Activations that the objective and the probes use; C channels on a T'×H'×W' grid.

    Attributes:
        pooled: (B, C), mean of the feature map.
        projected: (B, C, T', H', W'), output of the last bottleneck's last 1×1×1 convolution, before BatchNorm.
        summed: (B, C, T', H', W'), that bottleneck's residual sum, before its ReLU.
    """

    pooled: torch.Tensor
    projected: torch.Tensor
    summed: torch.Tensor


class Bottleneck(nn.Module):
    """Convolutions 1×1×1, 1×3×3, 3×1×1 (with nothing between these two) and 1×1×1, with a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: type[nn.BatchNorm3d]) -> None:
        super().__init__()
        channels_out = EXPANSION * channels
        space_stride = (1, stride, stride)
        self.conv1 = nn.Conv3d(channels_in, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv3d(channels, channels, (1, 3, 3), space_stride, (0, 1, 1), bias=False)
        self.conv2_t = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv3d(channels, channels_out, 1, bias=False)
        self.bn3 = norm(channels_out)
        self.downsample = (
            nn.Sequential(nn.Conv3d(channels_in, channels_out, 1, space_stride, bias=False), norm(channels_out))
            if stride != 1 or channels_in != channels_out
            else None
        )

    def residual_sum(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of `conv3` before its BatchNorm, and residual sum before the last ReLU."""
        inner = torch.relu(self.bn1(self.conv1(features)))
        inner = torch.relu(self.bn2(self.conv2_t(self.conv2(inner))))
        projected = self.conv3(inner)
        shortcut = features if self.downsample is None else self.downsample(features)
        return projected, self.bn3(projected) + shortcut

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to (B, 4·channels, T, H/stride, W/stride)."""
        return torch.relu(self.residual_sum(features)[1])


class Encoder(nn.Module):
    """Clips to pooled features and the activations that the alignment loss needs."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv3d(3, config.width, (4, 7, 7), STEM_STRIDE, (0, 3, 3), bias=False)
        norm = SynchronizedBatchNorm3d if config.batch_norm == "synchronized" else nn.BatchNorm3d
        self.bn1 = norm(config.width)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        channels_in = config.width
        for stage, num_blocks in enumerate(config.blocks):
            channels = config.width * 2**stage
            blocks = []
            for block in range(num_blocks):
                blocks.append(Bottleneck(channels_in, channels, 2 if stage > 0 and block == 0 else 1, norm))
                channels_in = EXPANSION * channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels_in
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def bottlenecks(self) -> list[Bottleneck]:
        """All bottlenecks, from input to output."""
        layers = (self.get_submodule(f"layer{stage + 1}") for stage in range(len(self.config.blocks)))
        return [cast(Bottleneck, block) for layer in layers for block in layer.children()]

    @property
    def last_norm(self) -> nn.BatchNorm3d:
        """The BatchNorm between `EncoderOutput.projected` and the last residual sum."""
        return self.bottlenecks[-1].bn3

    def forward(self, clips_bcthw: torch.Tensor) -> EncoderOutput:
        """Encode clips (B, 3, T, H, W), normalised by `normalise`."""
        features = self._apply_part(self, self._stem, clips_bcthw)
        *earlier, last = self.bottlenecks
        for block in earlier:
            features = self._apply_part(block, block, features)
        projected, summed = self._apply_part(last, last.residual_sum, features)
        return EncoderOutput(torch.relu(summed).mean(dim=(2, 3, 4)), projected, summed)

    def _apply_part(self, part: nn.Module, function: Callable[[torch.Tensor], Any], features: torch.Tensor) -> Any:
        """`function(features)`, with activation checkpointing if configured; `part` holds its modules."""
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint_activations(part, function, features)
        return function(features)

    def _stem(self, clips_bcthw: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.maxpool(torch.relu(self.bn1(self.conv1(clips_bcthw))))
        return features


def normalise(views: torch.Tensor) -> torch.Tensor:
    """Bytes (…, T, H, W, 3) to float32 (…, 3, T, H, W), standardised by ImageNet's mean and standard deviation."""
    mean, deviation = _row_statistics(views.device, views.shape[-2])
    # Whole rows of pixels: loops over three channels would be too short to be fast.
    rows = views.flatten(-2).to(torch.float32, copy=True)
    return rows.sub_(mean).div_(deviation).view(views.shape).movedim(-1, -4)


@cache
def _row_statistics(device: torch.device, width: int) -> torch.Tensor:
    """Mean and deviation in bytes for a row of pixels; cached, because a copy to the GPU waits for it."""
    return 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_DEVIATION], device=device).repeat(1, width)

from __future__ import annotations

import pytest
import torch

from mcl_dist.model.encoder import Encoder, EncoderConfig, normalise


def test_r2plus1d_50_has_the_published_size() -> None:
    encoder = Encoder(EncoderConfig())
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(27.3e6, rel=0.01)
    assert encoder.feature_dim == 2048
    assert len(encoder.bottlenecks) == 16


@pytest.mark.parametrize(("blocks", "frames", "crop"), [((1,), 4, 20), ((1, 1), 8, 33), ((1, 2, 1), 16, 48)])
def test_the_feature_map_has_the_grid_of_the_configuration(blocks: tuple[int, ...], frames: int, crop: int) -> None:
    config = EncoderConfig(width=2, blocks=blocks)
    output = Encoder(config).eval()(torch.zeros(1, 3, frames, crop, crop))
    assert output.projected.shape[2:] == config.grid(frames, crop)


def test_the_default_grid_is_4_by_7_by_7() -> None:
    assert EncoderConfig().grid(16, 224) == (4, 7, 7)


def test_the_pooled_feature_is_the_mean_of_the_residual_sum_after_relu() -> None:
    torch.manual_seed(0)
    output = Encoder(EncoderConfig(width=2, blocks=(1, 1))).eval()(torch.randn(2, 3, 8, 32, 32))
    torch.testing.assert_close(output.pooled, output.summed.clamp(min=0).mean(dim=(2, 3, 4)))


def test_normalise_maps_the_imagenet_mean_to_zero_and_moves_channels_first() -> None:
    mean = torch.tensor([123.675, 116.28, 103.53]).round().to(torch.uint8)
    clips = normalise(mean.expand(2, 4, 5, 6, 3))
    assert clips.shape == (2, 3, 4, 5, 6)
    assert clips.dtype == torch.float32
    assert clips.abs().max() < 0.01

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmarks.step_variants import StandaloneStep, StepVariant, noise
from launch.run.config import PretrainConfig
from mcl_dist.config import build_config
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig
from mcl_dist.objective.flops import flops_per_video
from mcl_dist.training.deepspeed_engine import pick_device


@pytest.mark.slow
def test_the_count_equals_that_of_a_step_on_real_tensors() -> None:
    tree = {
        "run": {"dir": "none"},
        "data": {"train": "none", "frames": 8, "crop": 32},
        "encoder": {"width": 4, "blocks": [1, 1]},
        "heads": {"dim": 8},
        "objective": {"queue": 64},
        "train": {"global_batch": 2},
    }
    config = build_config(PretrainConfig, tree)
    step = StandaloneStep(config, StepVariant("", closed_form=True, one_pass=True), pick_device())
    with FlopCounterMode(display=False) as counter:
        step(noise(config, pick_device()), lambda _: None)
    counted = flops_per_video(config.encoder, config.heads, config.data.frames, config.data.crop)
    assert 2 * counted == counter.get_total_flops()


@pytest.mark.slow
def test_a_step_of_the_reference_encoder_takes_240_gigaflops_per_video() -> None:
    # Four forwards of 40.5 GFLOPs, and a backward of twice as much, without the first layer's input gradient.
    assert 235e9 < flops_per_video(EncoderConfig(), HeadsConfig(), frames=16, crop=224) < 245e9


def test_activation_checkpointing_does_not_change_the_count() -> None:
    small = {"width": 4, "blocks": (1, 1)}
    configs = (EncoderConfig(**small, checkpointing=checkpointing) for checkpointing in (False, True))
    counts = [flops_per_video(config, HeadsConfig(dim=8), frames=8, crop=32) for config in configs]
    assert counts[0] == counts[1]

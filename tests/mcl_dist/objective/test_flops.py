from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from launch.benchmarks.step_forms import GrowingStep, LogSumExpForm, noise
from launch.run.config import PretrainConfig
from mcl_dist.config import build_config
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig
from mcl_dist.objective.flops import operations_per_video
from mcl_dist.training.deepspeed_engine import pick_device


def test_the_count_is_that_of_a_step_on_real_tensors() -> None:
    tree = {
        "run": {"dir": "none"},
        "data": {"train": "none", "frames": 8, "crop": 32},
        "encoder": {"width": 4, "blocks": [1, 1]},
        "heads": {"dim": 8},
        "objective": {"queue": 64},
        "train": {"global_batch": 2},
    }
    config = build_config(PretrainConfig, tree)
    step = GrowingStep(config, LogSumExpForm("", closed_form=True, one_pass=True), pick_device())
    with FlopCounterMode(display=False) as counter:
        step(noise(config, pick_device()), lambda _: None)
    counted = operations_per_video(config.encoder, config.heads, config.data.frames, config.data.crop)
    assert 2 * counted == counter.get_total_flops()


def test_a_video_costs_the_reference_encoder_a_quarter_of_a_teraflop() -> None:
    # 40.5 GFLOP a forward, four of them, and a backward of twice as much without the first layer's input.
    assert 235e9 < operations_per_video(EncoderConfig(), HeadsConfig(), frames=16, crop=224) < 245e9


def test_memory_spared_by_computing_twice_adds_nothing() -> None:
    small = {"width": 4, "blocks": (1, 1)}
    plain, spared = (EncoderConfig(**small, checkpointing=twice) for twice in (False, True))
    counts = [operations_per_video(each, HeadsConfig(dim=8), frames=8, crop=32) for each in (plain, spared)]
    assert counts[0] == counts[1]

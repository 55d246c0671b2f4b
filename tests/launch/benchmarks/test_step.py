from __future__ import annotations

import json

import pytest
import torch

from launch.benchmarks import reference_step
from launch.benchmarks.step import PHASES
from launch.benchmarks.step_variants import StepVariant, step_variants
from launch.cli.main import main
from mcl_dist.config import build_config
from mcl_dist.model.encoder import normalise
from mcl_dist.objective.losses import inter_loss, key_similarities
from mcl_dist.objective.negative_queue import NegativeQueue

SMALL = ("train.global_batch=2", "data.crop=32", "encoder.width=4", "encoder.blocks=[1]", "objective.queue=64")


def unit(*shape: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(len(shape))
    return torch.nn.functional.normalize(torch.randn(*shape, generator=draws), dim=-1)


@pytest.mark.slow
def test_every_variant_computes_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", *SMALL, "--steps", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    names = [each["name"] for each in results]
    assert names == ["plain", "closed_form", "one_pass", "fused", "channels_last", "trainer"]
    for each in results:
        assert each["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert list(each["ms"]) == list(PHASES)
        assert sum(each["ms"].values()) == pytest.approx(2e3 / each["videos_per_second"], rel=0.01)
        assert each["speedup"] == pytest.approx(results[0]["cpu_ms"] / each["cpu_ms"])
        assert each["peak_bytes"] > 2**20
        assert 0 < each["matmul_share"] < 1
        assert each["tflops"] > 0


@pytest.mark.slow
def test_variants_can_be_selected_and_an_unknown_one_is_rejected_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", *SMALL, "--steps", "1", "--json", "--forms", "fused,one_pass"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["one_pass", "fused"]
    assert main(["bench", "step", *SMALL, "--forms", "fused,slow"]) == 2
    errors = capsys.readouterr().err
    assert "--forms: found slow, must be of plain, closed_form" in errors
    assert "measuring" not in errors


def test_a_gpu_has_two_more_variants() -> None:
    from launch.run.config import PretrainConfig

    config = build_config(PretrainConfig, {"run": {"dir": "none"}, "data": {"train": "none"}})
    on_gpu = step_variants(config, torch.device("cuda"))
    assert on_gpu[0] == StepVariant("plain")
    assert [variant.name for variant in on_gpu[-3:]] == ["bfloat16", "compiled", "trainer"]
    assert on_gpu[-1] == StepVariant("trainer", *[True] * 7)


def test_the_reference_parts_equal_the_optimised_ones() -> None:
    query, keys, queue = unit(2, 8), unit(3, 2, 8), unit(16, 8)
    reference = reference_step.inter_loss(query, keys, queue, 0.1)
    optimised = inter_loss(key_similarities(query, keys), NegativeQueue(queue).log_sum_exp(query, 0.1), 0.1)
    torch.testing.assert_close(reference, optimised)
    ring = NegativeQueue(queue.clone(), position=13)
    ring.enqueue(keys)
    written = queue.clone()
    assert reference_step.enqueue(written, 13, keys) == ring.position
    assert torch.equal(written, ring.vectors)
    clips = torch.randint(0, 256, (2, 4, 8, 8, 3), dtype=torch.uint8)
    torch.testing.assert_close(reference_step.normalised(clips), normalise(clips))


def test_zero_steps_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--steps", "0"]) == 2
    assert "--steps: found 0" in capsys.readouterr().err

from __future__ import annotations

import pytest
import torch

from mcl_dist.errors import ConfigError
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from mcl_dist.training.lars import LARS, TRUST


def weight_and_bias() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape, generator=draw)) for shape in ((3, 4), (3,)))
    weight.grad, bias.grad = torch.randn(3, 4, generator=draw), torch.randn(3, generator=draw)
    return weight, bias


def test_two_steps_equal_the_formula_of_the_paper() -> None:
    weight, bias = weight_and_bias()
    rate, momentum, decay = 0.5, 0.9, 0.1
    expected, velocity = weight.detach().clone(), torch.zeros(3, 4)
    optimizer = LARS([weight, bias], lr=rate, momentum=momentum, weight_decay=decay)
    for _ in range(2):
        optimizer.step()
        assert weight.grad is not None
        local = TRUST * expected.norm() / (weight.grad.norm() + decay * expected.norm())
        velocity = momentum * velocity + rate * local * (weight.grad + decay * expected)
        expected = expected - velocity
    torch.testing.assert_close(weight.detach(), expected)


def test_biases_and_batch_norm_take_plain_momentum_sgd_without_decay() -> None:
    _, bias = weight_and_bias()
    _, plain = weight_and_bias()
    ours = LARS([bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.SGD([plain], lr=0.5, momentum=0.9)
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(bias, plain)


def test_a_zero_parameter_moves_at_the_global_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5, momentum=0.0, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))


def test_a_non_finite_gradient_changes_nothing() -> None:
    weight, bias = weight_and_bias()
    before = weight.detach().clone()
    optimizer = LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer.found_inf = torch.tensor(1.0)
    assert weight.grad is not None
    weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state[weight]["momentum_buffer"].any()


def test_lars_with_zero_shards_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.zero_stage: found 1, must be 0 with optimizer.name=lars"):
        OptimizerConfig(name="lars").check()
    OptimizerConfig(name="lars", zero_stage=0).check()

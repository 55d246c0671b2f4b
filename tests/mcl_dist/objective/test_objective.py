"""The objective with the alignment in closed form equals automatic differentiation, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import normalize

from mcl_dist.errors import ConfigError
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import Keys
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import LossWeights, Objective

BATCH, DIM, LAST = 4, 8, "layer2.0.conv3"
WEIGHTS = LossWeights(intra=1.0, alignment=2.0, order=0.5)


class Step(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]


def small_network(**config: object) -> Network:
    torch.manual_seed(0)
    return Network(EncoderConfig(width=4, blocks=(1, 1), **config), HeadsConfig(dim=DIM)).double().train()


def unit(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def backward(
    network: Network,
    parts: int = 1,
    compiled: Callable[[Objective], Callable[..., torch.Tensor]] = lambda objective: objective,
    layer: str | None = None,
) -> Step:
    """Loss, gradients and statistics of one step over a batch in equal parts."""
    draws = torch.Generator().manual_seed(1)
    clips = torch.randn(BATCH, 3, 8, 32, 32, generator=draws, dtype=torch.float64)
    motion = torch.rand(BATCH, 2, 4, 4, generator=draws, dtype=torch.float64)
    order = torch.tensor([0, 1, 1, 0])
    inter, intra, ordered = (unit(3, BATCH, DIM, seed=seed) for seed in (2, 3, 4))
    keys, queue = Keys(inter, intra, ordered, inter), NegativeQueue(unit(50, DIM, seed=5))
    objective = compiled(Objective(network, temperature=0.1, alignment_layer=layer))
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, BATCH, BATCH // parts):
        own = slice(start, start + BATCH // parts)
        loss = objective(clips[own], keys.select(own), queue, motion[own], order[own], WEIGHTS) / parts
        loss.backward()
        total += loss.detach()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return Step(total, gradients, dict(network.named_buffers()))


def check_equal(actual: Step, expected: Step) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-10)
    assert actual.gradients.keys() == expected.gradients.keys()
    for kind in ("gradients", "statistics"):
        for name, tensor in getattr(expected, kind).items():
            torch.testing.assert_close(getattr(actual, kind)[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_the_closed_form_equals_double_backward_in_loss_and_gradients() -> None:
    check_equal(backward(small_network()), backward(small_network(), layer=LAST))


def test_the_closed_form_equals_double_backward_with_activation_checkpointing() -> None:
    check_equal(backward(small_network(checkpointing=True)), backward(small_network(), layer=LAST))


def test_the_closed_form_equals_double_backward_with_gradient_accumulation() -> None:
    check_equal(backward(small_network(), parts=2), backward(small_network(), parts=2, layer=LAST))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "checkpointing"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_the_closed_form_equals_double_backward_when_compiled(backend: str, checkpointing: bool) -> None:
    torch.compiler.reset()
    network = small_network(checkpointing=checkpointing)
    compiled = backward(network, compiled=lambda objective: torch.compile(objective, backend=backend))
    check_equal(compiled, backward(small_network(), layer=LAST))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_only_the_queue_breaks_the_graph_of_the_compiled_objective() -> None:
    torch.compiler.reset()
    network = small_network()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    backward(network, compiled=lambda objective: torch.compile(objective, backend=counting))
    assert len(graphs) == 3  # before the log-sum-exp, before the mean of the queue, and after it


def test_the_alignment_can_use_a_layer_with_another_grid() -> None:
    step = backward(small_network(), layer="layer1.0.conv3")
    other = backward(small_network())
    assert step.loss.isfinite()
    assert (step.loss - other.loss).abs() > 1e-6
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())


def test_an_unknown_layer_is_rejected_with_similar_names() -> None:
    message = r"objective\.alignment_layer: .* no layer `layer2\.0\.conv9`.*layer2\.0\.conv3"
    with pytest.raises(ConfigError, match=message):
        Objective(small_network(), temperature=0.1, alignment_layer="layer2.0.conv9")


def test_synchronised_batch_norm_supports_only_the_closed_form() -> None:
    with pytest.raises(ConfigError, match="cannot be differentiated twice"):
        Objective(small_network(batch_norm="synchronized"), temperature=0.1, alignment_layer=LAST)


def test_autocast_to_bfloat16_is_close_to_float32() -> None:
    losses = []
    for autocast in (False, True):
        network = small_network().float()
        draws = torch.Generator().manual_seed(1)
        # 16 frames: with 8, the last maps have 2 frames, for which PyTorch's bfloat16 gradients on CPUs are wrong.
        clips, motion = torch.randn(BATCH, 3, 16, 32, 32, generator=draws), torch.rand(BATCH, 4, 4, 4, generator=draws)
        keys = Keys(*(unit(3, BATCH, DIM, seed=seed).float() for seed in (2, 3, 4, 2)))
        queue = NegativeQueue(unit(50, DIM, seed=5).float())
        objective = Objective(network, temperature=0.1, autocast=autocast)
        loss = objective(clips, keys, queue, motion, torch.tensor([0, 1, 1, 0]), WEIGHTS)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in network.parameters())
        losses.append({name: float(value) for name, value in objective.report.items()})
    exact, rounded = losses
    for term in ("loss_inter", "loss_intra", "loss_order"):
        assert rounded[term] == pytest.approx(exact[term], rel=0.02)

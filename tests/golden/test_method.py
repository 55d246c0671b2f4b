"""The method equals golden vectors of the reference implementation."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.model.pretrained_weights import from_reference, inflate, to_reference
from mcl_dist.objective.alignment import align, alignment_map, similarity_gradient
from mcl_dist.objective.losses import inter_loss, intra_loss, key_similarities
from mcl_dist.objective.momentum_encoder import Keys, MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import LossWeights, Objective
from mcl_dist.objective.schedule import Schedule

TEMPERATURE = 0.1
LEARNING_RATE, SGD_MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4  # of the golden step
KEY_MOMENTUM = 0.999
STEP_WEIGHTS = LossWeights(intra=1.0, alignment=1.0, order=0.5)


def arrays(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}


def ruled_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor by the rule of the golden files' README: from its name, its shape and a seed."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith(("running_mean", ".bias")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    draws = np.random.default_rng(zlib.crc32(name.encode()) + seed).standard_normal(shape)
    return torch.from_numpy((draws * math.sqrt(2 / math.prod(shape[1:]))).astype(np.float32))


def ruled_state(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    return {name: ruled_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_alignment_similarities_and_loss_equal_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "alignment.npz")
    result = align(alignment_map(vectors["gradient"]), vectors["target"])
    check_close(result.spatiotemporal, vectors["sim_spatiotemporal"], 1e-9)
    check_close(result.spatial, vectors["sim_spatial"], 1e-9)
    check_close(result.temporal, vectors["sim_temporal"], 1e-9)
    check_close(result.loss, vectors["loss"], 1e-9)


@pytest.mark.slow
def test_inter_logits_and_loss_equal_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "contrast.npz")
    similarities = key_similarities(vectors["q_inter"], vectors["k_inter"])
    negatives = vectors["q_inter"] @ vectors["memory_before"].T
    logits = torch.cat([similarities.reshape(-1, 1), negatives.repeat(3, 1)], dim=1) / TEMPERATURE
    check_close(logits, vectors["logits_inter"], 1e-9)
    check_close(similarities[0, :, None], vectors["positive"], 1e-9)
    log_sum_exp = NegativeQueue(vectors["memory_before"]).log_sum_exp(vectors["q_inter"], TEMPERATURE)
    check_close(inter_loss(similarities, log_sum_exp, TEMPERATURE), vectors["loss_inter"], 1e-9)


def test_intra_logits_and_loss_equal_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "contrast.npz")
    similarities = key_similarities(vectors["q_intra"], vectors["k_intra"])
    logits = torch.stack([similarities[0].repeat(2), similarities[1:].flatten()], dim=1) / TEMPERATURE
    check_close(logits, vectors["logits_intra"], 1e-9)
    check_close(intra_loss(similarities, TEMPERATURE), vectors["loss_intra"], 1e-9)


def test_the_queue_enqueues_all_ranks_keys_and_wraps_like_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "contrast.npz")
    queue = NegativeQueue(vectors["memory_before"].clone(), int(vectors["index_before"]))
    queue.enqueue(vectors["k_inter_all"])
    check_close(queue.vectors, vectors["memory_after"], 1e-9)
    assert queue.position == int(vectors["index_after"])


def test_the_learning_rate_of_every_step_equals_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "lr_schedule.npz")
    steps_per_epoch, epochs = int(vectors["iters_per_epoch"]), int(vectors["epochs"])
    schedule = Schedule(
        float(vectors["base_lr"]), steps_per_epoch, epochs * steps_per_epoch, float(vectors["warmup_epochs"])
    )
    rates = [schedule.learning_rate(step) for step in range(len(vectors["lr"]))]
    check_close(torch.tensor(rates, dtype=torch.float64), vectors["lr"], 1e-12)


@pytest.mark.slow
def test_reference_checkpoints_load_strictly(golden: Path) -> None:
    shapes = json.loads((golden / "reference_state_dict.json").read_text())
    network = Network(EncoderConfig(), HeadsConfig())
    network.load_state_dict(from_reference(ruled_state(shapes, seed=0)), strict=True)
    assert {name: list(value.shape) for name, value in to_reference(network.state_dict()).items()} == shapes


@pytest.mark.parametrize(("variant", "mlp_head"), [("kinetics", True), ("ucf101", False)])
def test_inflation_of_a_2d_network_equals_the_reference(golden: Path, variant: str, mlp_head: bool) -> None:
    stored = json.loads((golden / "inflation.json").read_text())
    expected = stored["inflated"][variant]
    state = to_reference(inflate(ruled_state(stored["source_shapes"], stored["seed"]), mlp_head=mlp_head))
    assert {name: list(value.shape) for name, value in state.items()} == {
        name: tensor["shape"] for name, tensor in expected["tensors"].items()
    }
    for name, tensor in expected["tensors"].items():
        values = state[name].double()
        assert (values.sum().item(), values.abs().sum().item()) == pytest.approx(
            (tensor["sum"], tensor["abs"]), rel=1e-12, abs=1e-10
        )
    all_names = to_reference(Network(EncoderConfig(), HeadsConfig()).state_dict())
    missing = [name for name in all_names if name not in state and not name.endswith("num_batches_tracked")]
    assert sorted(missing) == sorted(expected["missing"])


@pytest.fixture(scope="module")
def golden_step(golden: Path) -> dict[str, object]:
    """One step of the full network in float64, as described in the golden files' README."""
    vectors = arrays(golden / "train_step.npz")
    seed = int(vectors["seed"])
    shapes = json.loads((golden / "reference_state_dict.json").read_text())
    network = Network(EncoderConfig(), HeadsConfig()).double().train()
    network.load_state_dict(from_reference(ruled_state(shapes, seed)), strict=True)
    momentum = MomentumEncoder(network, ProcessGroup(), seed=0, autocast=False)
    draws = np.random.default_rng(seed + 7)
    clips = [
        torch.from_numpy(draws.standard_normal((2, 3, 16, 112, 112)).astype(np.float32)).double() for _ in range(4)
    ]
    rows = torch.from_numpy(np.random.default_rng(seed + 9).standard_normal((64, 128)))
    queue = NegativeQueue(rows / rows.norm(dim=1, keepdim=True))

    with torch.no_grad():
        keys = [momentum.network(clip) for clip in clips[1:]]
    inter, intra, order = (
        torch.stack([getattr(key, head).vector for key in keys]) for head in ("inter", "intra", "order")
    )
    objective = Objective(network, temperature=TEMPERATURE)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    total = objective(
        clips[0], Keys(inter, intra, order, inter), queue, vectors["motion"], vectors["order_target"], STEP_WEIGHTS
    )
    total.backward()
    gradients = to_reference({name: value.grad.clone() for name, value in network.named_parameters()})
    optimizer.step()
    momentum.update(network.parameters(), KEY_MOMENTUM)
    queue.enqueue(inter)
    return {
        "vectors": vectors,
        "report": objective.report,
        "keys": (inter, intra, order),
        "queue": queue.vectors,
        "grad_norm": gradients,
        "param_norm_after_sgd": to_reference(dict(network.named_parameters())),
        "ema_norm_after": to_reference(dict(momentum.network.named_parameters())),
    }


@pytest.mark.slow
@pytest.mark.parametrize("term", ["inter", "intra", "alignment", "order"])
def test_the_losses_of_a_step_equal_the_reference(golden_step: dict[str, dict], term: str) -> None:
    expected = golden_step["vectors"][f"loss_{term}"]
    check_close(golden_step["report"][f"loss_{term}"], expected, 1e-6)


@pytest.mark.slow
def test_the_total_and_the_keys_of_a_step_equal_the_reference(golden_step: dict[str, dict]) -> None:
    vectors = golden_step["vectors"]
    check_close(golden_step["report"]["loss"], vectors["loss_total"], 1e-6)
    for actual, name in zip(golden_step["keys"], ("inter_k", "intra_k", "order_k"), strict=True):
        check_close(actual, vectors[name], 1e-9)
    check_close(golden_step["queue"], vectors["queue_after"], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grad_norm", "param_norm_after_sgd", "ema_norm_after"])
def test_every_norm_after_a_step_equals_the_reference(golden: Path, golden_step: dict[str, dict], kind: str) -> None:
    expected = json.loads((golden / "train_step_norms.json").read_text())[kind]
    actual = {name: tensor.detach().norm().item() for name, tensor in golden_step[kind].items()}
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.slow
def test_the_alignments_activations_equal_the_reference(golden: Path) -> None:
    vectors = arrays(golden / "train_step.npz")
    seed = int(vectors["seed"])
    shapes = json.loads((golden / "reference_state_dict.json").read_text())
    network = Network(EncoderConfig(), HeadsConfig()).double().train()
    network.load_state_dict(from_reference(ruled_state(shapes, seed)), strict=True)
    clip = np.random.default_rng(seed + 7).standard_normal((2, 3, 16, 112, 112)).astype(np.float32)
    output = network(torch.from_numpy(clip).double())
    gradient = similarity_gradient(network, output, vectors["inter_k"][0])
    check_close(output.features.projected[:, :8], vectors["conv3_sample"], 1e-9)
    check_close(gradient[:, :8], vectors["gradient_sample"], 1e-9)

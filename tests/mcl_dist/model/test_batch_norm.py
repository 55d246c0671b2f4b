"""Synchronised BatchNorm on gloo ranks equals BatchNorm over the whole batch on one rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.functional import normalize

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import Started
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import Keys, MomentumEncoder
from mcl_dist.objective.negative_queue import NegativeQueue
from mcl_dist.objective.objective import LossWeights, Objective
from mcl_dist.run_log.listeners import MetricsFile
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from tests.support.gloo_runs import STEPS, build_trainer, join_ranks, noise

GLOBAL_BATCH, DIM = 8, 8


def small_network(batch_norm: str, *, checkpointing: bool = False) -> Network:
    torch.manual_seed(0)
    config = EncoderConfig(width=4, blocks=(1, 1), batch_norm=batch_norm, checkpointing=checkpointing)
    return Network(config, HeadsConfig(dim=DIM)).double().train()


def backward(network: Network, own: slice) -> torch.Tensor:
    """Loss of some of the global batch's videos; the network keeps the gradients."""
    draws = torch.Generator().manual_seed(1)
    clips = torch.randn(GLOBAL_BATCH, 3, 8, 32, 32, generator=draws, dtype=torch.float64)
    motion = torch.rand(GLOBAL_BATCH, 2, 4, 4, generator=draws, dtype=torch.float64)
    vectors = normalize(torch.randn(4, 3, GLOBAL_BATCH, DIM, generator=draws, dtype=torch.float64), dim=-1)
    queue = NegativeQueue(normalize(torch.randn(50, DIM, generator=draws, dtype=torch.float64), dim=-1))
    order = torch.arange(GLOBAL_BATCH) % 2
    objective = Objective(network, temperature=0.1)
    loss = objective(clips[own], Keys(*vectors).select(own), queue, motion[own], order[own], LossWeights(1.0, 2.0, 0.5))
    loss.backward()
    return loss.detach()


def rank_slice(group: ProcessGroup) -> slice:
    size = GLOBAL_BATCH // group.size
    return slice(size * group.rank, size * (group.rank + 1))


def check_gradients_against_the_whole_batch(*changes: str) -> None:
    distributed.init_process_group("gloo")
    group = ProcessGroup()
    whole = small_network("local")
    loss = backward(whole, slice(None))
    synchronized = small_network("synchronized", checkpointing="checkpointing" in changes)
    if "compiled" in changes:
        synchronized.encoder.compile(backend="aot_eager")
    torch.testing.assert_close(group.mean(backward(synchronized, rank_slice(group))), loss, rtol=0, atol=1e-10)
    for (name, actual), expected in zip(synchronized.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(group.mean(actual.grad), expected.grad, rtol=0, atol=1e-10, msg=name)
    for (name, actual), expected in zip(synchronized.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, msg=name)


def check_keys_against_the_whole_batch() -> None:
    distributed.init_process_group("gloo")
    group = ProcessGroup()
    views = torch.randint(0, 256, (GLOBAL_BATCH, 4, 4, 16, 16, 3), dtype=torch.uint8)
    distributed.broadcast(views, src=0)
    own = rank_slice(group)
    keys = MomentumEncoder(small_network("synchronized"), group, seed=0, autocast=False).encode(views[own], step=3)
    single = ProcessGroup()
    single.rank, single.size = 0, 1
    expected = MomentumEncoder(small_network("local"), single, seed=0, autocast=False).encode(views, step=3)
    torch.testing.assert_close(keys.inter_all, expected.inter, rtol=0, atol=1e-10)
    for actual, whole in zip(keys[:3], expected[:3], strict=True):
        torch.testing.assert_close(actual, whole[:, own], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "changes"), [(2, ["checkpointing"]), (2, ["checkpointing", "compiled"]), (4, [])])
def test_a_synchronised_step_equals_a_step_on_the_whole_batch(
    run_ranks: Callable[..., None], count: int, changes: list[str]
) -> None:
    run_ranks(__file__, check_gradients_against_the_whole_batch.__name__, count, *changes)


def train(folder: str) -> None:
    group = join_ranks()
    config = OptimizerConfig(learning_rate=0.01, zero_stage=1)
    trainer = build_trainer(folder, group, config, lambda start: noise(group, start), batch_norm="synchronized")
    if group.is_first:
        trainer.listeners = [MetricsFile(Path(folder) / "metrics.jsonl")]
        trainer.listeners[0](Started(0, STEPS, None))
    trainer.fit()


@pytest.mark.slow
def test_the_losses_of_a_synchronised_run_do_not_depend_on_the_number_of_ranks(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    losses = {}
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        run_ranks(__file__, train.__name__, count, folder)
        losses[count] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses[1]) == STEPS
    assert losses[2] == pytest.approx(losses[1], rel=0, abs=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=0, abs=1e-5)


@pytest.mark.slow
def test_synchronised_keys_equal_those_of_the_whole_batch(run_ranks: Callable[..., None]) -> None:
    run_ranks(__file__, check_keys_against_the_whole_batch.__name__, 2)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo's teardown sometimes aborts

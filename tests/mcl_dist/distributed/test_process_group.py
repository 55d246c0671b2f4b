"""Collectives between gloo ranks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from mcl_dist.checkpoint.consensus import Consensus
from mcl_dist.distributed.process_group import ProcessGroup, set_collective_timeout
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from tests.support import gloo_runs as runs

BATCH = 3


def join_ranks() -> ProcessGroup:
    distributed.init_process_group("gloo")
    return ProcessGroup()


def permute_like_a_single_rank() -> None:
    group = join_ranks()
    everything = torch.arange(BATCH * group.size * 2, dtype=torch.uint8).reshape(-1, 2)
    own = slice(BATCH * group.rank, BATCH * (group.rank + 1))
    for seed in range(5):
        permutation = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(group.permute(everything[own], permutation), everything[permutation][own])


def gather_in_rank_order() -> None:
    group = join_ranks()
    rows = torch.full((BATCH, 2), float(group.rank))
    expected = torch.arange(float(group.size)).repeat_interleave(BATCH)[:, None].expand(-1, 2)
    assert torch.equal(group.gather(rows), expected)
    assert group.mean(rows[0]).tolist() == [(group.size - 1) / 2] * 2
    assert group.from_first(7 + group.rank) == 7
    assert group.first_text("") == ""
    assert group.first_text("SIGTERM" if group.rank else "") == "SIGTERM at rank 1"


def every_group_times_out_on_a_silent_rank(folder: str) -> None:
    """Includes DeepSpeed's groups, which have timeouts of their own until they are set; not the checkpoint group."""
    group = runs.join_ranks()
    trainer = runs.build_trainer(folder, group, OptimizerConfig(), lambda start: runs.noise(group, start))
    consensus: Consensus = trainer.checkpoints.consensus
    all_groups = list(distributed_c10d._world.pg_map)
    groups = [each for each in all_groups if each is not consensus.gloo_group]
    assert set_collective_timeout(1) == len(groups) == len(all_groups) - 1 > 1
    results: list[list[int]] = []
    exchange = threading.Thread(target=lambda: results.append(consensus.run_on_all_ranks(lambda: group.rank)))
    store = distributed_c10d._get_default_store()
    if group.is_first:
        exchange.start()  # waits for the other rank longer than all groups below together
        for each in groups:
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                distributed.all_reduce(torch.zeros(1), group=each)
        store.set("timed out", "")
    store.wait(["timed out"])
    if not group.is_first:
        exchange.start()
    exchange.join()
    assert results == [[0, 1]]
    os._exit(0)  # no group is left for a barrier


def keys_return_to_their_videos() -> None:
    """With fixed BatchNorm statistics, shuffled encoding must equal plain encoding."""
    group = join_ranks()
    torch.manual_seed(0)
    network = Network(EncoderConfig(width=4, blocks=(1, 1)), HeadsConfig(dim=8))
    momentum = MomentumEncoder(network, group, seed=5, autocast=False)
    momentum.network.eval()
    views = torch.randint(0, 256, (2 * group.size, 4, 4, 16, 16, 3), dtype=torch.uint8)
    own = slice(2 * group.rank, 2 * group.rank + 2)
    keys = momentum.encode(views[own], step=3)
    single = ProcessGroup()
    single.rank, single.size = 0, 1
    alone = MomentumEncoder(network, single, seed=5, autocast=False)
    alone.network.eval()
    expected = alone.encode(views, step=0)
    torch.testing.assert_close(keys.inter_all, expected.inter)
    torch.testing.assert_close(keys.inter, expected.inter[:, own])
    torch.testing.assert_close(keys.intra, expected.intra[:, own])
    torch.testing.assert_close(keys.order, expected.order[:, own])


def count_sent(group: ProcessGroup) -> Callable[[], dict[str, int]]:
    """Count the bytes that this rank sends to other ranks from now on, by collective."""
    sent = {"all_to_all_single": 0, "all_gather": 0}
    all_to_all_single, all_gather = distributed.all_to_all_single, distributed.all_gather

    def counting_all_to_all(output, rows, output_sizes=None, sizes=None):
        kept = sizes[group.rank] if sizes else len(rows) // group.size
        sent["all_to_all_single"] += (len(rows) - kept) * rows[0].nbytes
        all_to_all_single(output, rows, output_sizes, sizes)

    def counting_all_gather(gathered, rows):
        sent["all_gather"] += rows.nbytes * (group.size - 1)
        all_gather(gathered, rows)

    distributed.all_to_all_single, distributed.all_gather = counting_all_to_all, counting_all_gather
    return lambda: sent


def shuffling_sends_at_most_the_own_clips() -> None:
    """Returned key vectors and keys for the queue included."""
    group = join_ranks()
    network = Network(EncoderConfig(width=4, blocks=(1,)), HeadsConfig(dim=8))
    momentum = MomentumEncoder(network, group, seed=5, autocast=False)
    views = torch.randint(0, 256, (8, 4, 4, 32, 32, 3), dtype=torch.uint8)
    own_clips = views[:, 1:].nbytes
    sent_so_far = count_sent(group)
    for step in range(3):
        before = sum(sent_so_far().values())
        momentum.encode(views, step)
        sent = sum(sent_so_far().values()) - before
        print(f"rank {group.rank} of {group.size}, step {step}: {sent} bytes sent, own clips have {own_clips}")
        assert 0 < sent <= own_clips


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_shuffled_batch_norm_sends_at_most_the_bytes_of_the_own_clips(
    run_ranks: Callable[..., None], count: int
) -> None:
    run_ranks(__file__, shuffling_sends_at_most_the_own_clips.__name__, count)


@pytest.mark.slow
def test_all_process_groups_but_that_of_checkpoints_time_out_on_a_silent_rank(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, every_group_times_out_on_a_silent_rank.__name__, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("check", [permute_like_a_single_rank, gather_in_rank_order, keys_return_to_their_videos])
def test_collectives_neither_lose_nor_reorder_rows(
    run_ranks: Callable[..., None], check: Callable[[], None], count: int
) -> None:
    run_ranks(__file__, check.__name__, count)
    assert check.__name__ in globals()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo sometimes aborts during teardown

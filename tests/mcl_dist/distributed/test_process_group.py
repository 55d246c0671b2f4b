"""Exchanges between ranks, on gloo."""

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
from mcl_dist.distributed.process_group import ProcessGroup, limit_waiting
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder
from mcl_dist.training.deepspeed_engine import OptimizerConfig
from tests.support import gloo_runs as runs

BATCH = 3


def joined() -> ProcessGroup:
    distributed.init_process_group("gloo")
    return ProcessGroup()


def permute_as_if_alone() -> None:
    group = joined()
    everything = torch.arange(BATCH * group.size * 2, dtype=torch.uint8).reshape(-1, 2)
    own = slice(BATCH * group.rank, BATCH * (group.rank + 1))
    for seed in range(5):
        permutation = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(group.permute(everything[own], permutation), everything[permutation][own])


def gather_in_rank_order() -> None:
    group = joined()
    rows = torch.full((BATCH, 2), float(group.rank))
    expected = torch.arange(float(group.size)).repeat_interleave(BATCH)[:, None].expand(-1, 2)
    assert torch.equal(group.gather(rows), expected)
    assert group.mean(rows[0]).tolist() == [(group.size - 1) / 2] * 2
    assert group.from_first(7 + group.rank) == 7
    assert group.first_word("") == ""
    assert group.first_word("SIGTERM" if group.rank else "") == "SIGTERM at rank 1"


def every_group_gives_up_on_a_silent_rank(folder: str) -> None:
    """DeepSpeed's groups included, which have limits of their own until they are given one; not the checkpoints'."""
    group = runs.joined()
    trainer = runs.put_together(folder, group, OptimizerConfig(), lambda start: runs.noise(group, start))
    council: Consensus = trainer.checkpoints._council
    made = list(distributed_c10d._world.pg_map)
    groups = [group for group in made if group is not council._group]
    assert limit_waiting(1) == len(groups) == len(made) - 1 > 1
    heard: list[list[int]] = []
    meeting = threading.Thread(target=lambda: heard.append(council.together(lambda: group.rank)))
    store = distributed_c10d._get_default_store()
    if group.is_first:
        meeting.start()  # waits for the other rank longer than all groups below together
        for group in groups:
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                distributed.all_reduce(torch.zeros(1), group=group)
        store.set("given up", "")
    store.wait(["given up"])
    if not group.is_first:
        meeting.start()
    meeting.join()
    assert heard == [[0, 1]]
    os._exit(0)  # there is no group left for a barrier


def keys_come_back_to_their_videos() -> None:
    """With BatchNorm's statistics out of play, shuffled encoding must equal plain encoding."""
    group = joined()
    torch.manual_seed(0)
    network = Network(EncoderConfig(width=4, blocks=(1, 1)), HeadsConfig(dim=8))
    momentum = MomentumEncoder(network, group, seed=5, autocast=False)
    momentum.network.eval()
    views = torch.randint(0, 256, (2 * group.size, 4, 4, 16, 16, 3), dtype=torch.uint8)
    own = slice(2 * group.rank, 2 * group.rank + 2)
    keys = momentum.encode(views[own], step=3)
    alone = MomentumEncoder(network, ProcessGroup(), seed=5, autocast=False)
    alone._group.rank, alone._group.size = 0, 1
    alone.network.eval()
    expected = alone.encode(views, step=0)
    torch.testing.assert_close(keys.inter_all, expected.inter)
    torch.testing.assert_close(keys.inter, expected.inter[:, own])
    torch.testing.assert_close(keys.intra, expected.intra[:, own])
    torch.testing.assert_close(keys.order, expected.order[:, own])


def count_sent(group: ProcessGroup) -> Callable[[], dict[str, int]]:
    """From now on, count the bytes that this rank hands to others, by collective."""
    sent = {"all_to_all_single": 0, "all_gather": 0}
    all_to_all_single, all_gather = distributed.all_to_all_single, distributed.all_gather

    def counting_all_to_all(output, rows, output_sizes=None, sizes=None):
        stays = sizes[group.rank] if sizes else len(rows) // group.size
        sent["all_to_all_single"] += (len(rows) - stays) * rows[0].nbytes
        all_to_all_single(output, rows, output_sizes, sizes)

    def counting_all_gather(gathered, rows):
        sent["all_gather"] += rows.nbytes * (group.size - 1)
        all_gather(gathered, rows)

    distributed.all_to_all_single, distributed.all_gather = counting_all_to_all, counting_all_gather
    return lambda: sent


def shuffling_sends_no_more_than_the_own_clips() -> None:
    """Vectors that come back and keys for the queue included."""
    group = joined()
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
def test_shuffled_batch_norm_sends_no_more_than_the_own_clips_as_bytes(
    run_ranks: Callable[..., None], count: int
) -> None:
    run_ranks(__file__, shuffling_sends_no_more_than_the_own_clips.__name__, count)


@pytest.mark.slow
def test_process_groups_give_up_on_a_rank_that_does_not_answer_but_for_that_of_checkpoints(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(__file__, every_group_gives_up_on_a_silent_rank.__name__, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("check", [permute_as_if_alone, gather_in_rank_order, keys_come_back_to_their_videos])
def test_exchanges_between_ranks_lose_and_reorder_nothing(
    run_ranks: Callable[..., None], check: Callable[[], None], count: int
) -> None:
    run_ranks(__file__, check.__name__, count)
    assert check.__name__ in globals()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # tearing gloo down aborts now and then

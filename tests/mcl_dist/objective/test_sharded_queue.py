"""The sharded queue equals the replicated one, on gloo ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch
from torch import distributed
from torch.nn.functional import normalize

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.objective.losses import inter_loss, key_similarities
from mcl_dist.objective.negative_queue import NegativeQueue

SIZE, DIM, BATCH, STEPS = 101, 8, 5, 4  # 101 is not divisible by the number of ranks or of keys per step


def unit(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sharded_equals_replicated() -> None:
    """Compare losses, gradients, contents and loading over several steps, past the end of the ring."""
    distributed.init_process_group("gloo")
    group = ProcessGroup()
    own = slice(BATCH * group.rank, BATCH * (group.rank + 1))
    start = unit(SIZE, DIM, seed=0)
    queues = [NegativeQueue(start, position=90, group=group, sharded=sharded) for sharded in (True, False)]
    assert abs(len(queues[0].vectors) - SIZE / group.size) < 1
    for step in range(STEPS):
        keys = unit(3, BATCH * group.size, DIM, seed=10 + step)
        losses, gradients = [], []
        for queue in queues:
            queries = unit(BATCH * group.size, DIM, seed=20 + step)[own].requires_grad_()
            loss = inter_loss(key_similarities(queries, keys[:, own]), queue.log_sum_exp(queries, 0.1), 0.1)
            loss.backward()
            losses.append(loss.detach())
            gradients.append(queries.grad)
            queue.enqueue(keys)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
        torch.testing.assert_close(*(queue.mean() for queue in queues))
    sharded, replicated = queues
    assert torch.equal(sharded.shard(), replicated.shard())
    assert sharded.position == replicated.position == (90 + STEPS * 3 * BATCH * group.size) % SIZE
    resumed = NegativeQueue(start, group=group, sharded=True)
    resumed.load(replicated.vectors, replicated.position)
    assert torch.equal(resumed.vectors, sharded.vectors)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sharded_queue_equals_a_replicated_one(run_ranks: Callable[..., None], count: int) -> None:
    run_ranks(__file__, sharded_equals_replicated.__name__, count)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.barrier()
    os._exit(0)  # gloo's teardown sometimes aborts

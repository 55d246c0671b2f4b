from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import ConfigError
from mcl_dist.objective.log_sum_exp import LogSumExp, chunked, fused, has_fused_kernel, log_sum_exp
from mcl_dist.objective.negative_queue import NegativeQueue


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def numbered(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 2)


def test_first_second_and_third_keys_are_written_in_order_and_wrap_around() -> None:
    queue = NegativeQueue(torch.zeros(8, 2), position=5)
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2))
    assert queue.vectors[:, 0].tolist() == [4, 5, 6, 0, 0, 1, 2, 3]
    assert queue.position == 3


def test_the_newest_keys_remain_when_there_are_more_than_the_queue_holds() -> None:
    queue = NegativeQueue(torch.zeros(4, 2))
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2))
    assert sorted(queue.vectors[:, 0].tolist()) == [3, 4, 5, 6]
    assert queue.vectors[queue.position - 1, 0] == 6


def test_a_skipped_step_writes_nothing() -> None:
    queue = NegativeQueue(torch.zeros(8, 2), position=5)
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2), taken=torch.tensor(0.0))
    assert not queue.vectors.any()
    queue.position = 5
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2), taken=torch.tensor(1.0))
    assert queue.vectors[:, 0].tolist() == [4, 5, 6, 0, 0, 1, 2, 3]


def test_a_random_queue_holds_unit_vectors_determined_by_the_seed() -> None:
    first, second = (
        NegativeQueue.random(16, 8, torch.Generator().manual_seed(3), torch.device("cpu")).vectors for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("kernel", [chunked, fused])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_each_kernel_equals_an_explicit_softmax(
    kernel: Callable[..., LogSumExp], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcl_dist.objective.log_sum_exp.CHUNK_LOGITS", 5 * 300)
    queries, vectors = unit(5, 8, seed=0), unit(count, 8, seed=1)
    logits = queries @ vectors.T / 0.1
    value, mean = kernel(queries, vectors, 0.1)
    torch.testing.assert_close(value, torch.logsumexp(logits, dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, torch.softmax(logits, dim=1) @ vectors, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kernel", [chunked, fused])
def test_a_tiny_temperature_does_not_overflow(kernel: Callable[..., LogSumExp]) -> None:
    queries, vectors = unit(5, 8, seed=0, dtype=torch.float32), unit(50, 8, seed=1, dtype=torch.float32)
    value, mean = kernel(queries, vectors, 1e-3)
    torch.testing.assert_close(value, torch.logsumexp(queries @ vectors.T / 1e-3, dim=1))
    assert mean.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 6])  # 6 floats are not a multiple of 16 bytes: computed in chunks
@pytest.mark.parametrize("count", [100, 65536, 70001])
def test_the_kernel_chosen_on_a_gpu_equals_float64(dim: int, count: int) -> None:
    queries, vectors = unit(48, dim, seed=0), unit(count, dim, seed=1)
    logits = queries @ vectors.T / 0.1
    assert has_fused_kernel(vectors.float().cuda()) == (dim == 128)
    result = log_sum_exp(queries.float().cuda(), vectors.float().cuda(), 0.1)
    torch.testing.assert_close(result.value.cpu().double(), torch.logsumexp(logits, dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.mean.cpu().double(), torch.softmax(logits, dim=1) @ vectors, rtol=0, atol=1e-6)


def test_the_gradient_equals_that_of_explicit_logits() -> None:
    queries, vectors = unit(5, 8, seed=0).requires_grad_(), unit(100, 8, seed=1)
    explicit = torch.logsumexp(queries @ vectors.T / 0.1, dim=1)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((weights * value).sum(), queries)[0]
        for value in (NegativeQueue(vectors).log_sum_exp(queries, 0.1), explicit)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_queue_smaller_than_the_number_of_ranks_cannot_be_sharded() -> None:
    group = ProcessGroup()
    group.size = 4
    with pytest.raises(ConfigError, match=r"objective\.queue: 3 negatives cannot be sharded over 4 ranks"):
        NegativeQueue(torch.zeros(3, 2), group=group, sharded=True)

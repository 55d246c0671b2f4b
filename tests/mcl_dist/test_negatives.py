from __future__ import annotations

import torch

from mcl_dist.negatives import Queue


def numbered(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 2)


def test_keys_are_written_first_second_third_and_wrap_around() -> None:
    queue = Queue(torch.zeros(8, 2), position=5)
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2))
    assert queue.vectors[:, 0].tolist() == [4, 5, 6, 0, 0, 1, 2, 3]
    assert queue.position == 3


def test_the_newest_keys_stay_when_they_outnumber_the_queue() -> None:
    queue = Queue(torch.zeros(4, 2))
    queue.enqueue(numbered(1, 6).reshape(3, 2, 2))
    assert sorted(queue.vectors[:, 0].tolist()) == [3, 4, 5, 6]
    assert queue.vectors[queue.position - 1, 0] == 6


def test_a_random_queue_holds_unit_vectors_that_the_seed_decides() -> None:
    first, second = (
        Queue.random(16, 8, torch.Generator().manual_seed(3), torch.device("cpu")).vectors for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(16))

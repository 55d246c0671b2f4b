from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dataloading.loader.cuda_stream import on_side_stream, wait_for_batch
from dataloading.loader.step_jobs import DecodedStep
from mcl_dist.batch import TubeletBatch


def slow_steps(device: torch.device) -> Iterator[DecodedStep]:
    """Steps whose batches hold their number; the GPU computes them long after the host has continued."""
    for step in range(4):
        work = torch.eye(4096, device=device)
        for _ in range(50):
            work = work @ work
        number = (work[0, 0] * step).expand(2, 4)
        parts = {name: number.clone() for name in ("views", "motion", "order", "samples", "boxes")}
        yield DecodedStep(step, TubeletBatch(**parts), 0, [], {})


@pytest.mark.gpu
def test_a_batch_of_a_side_stream_is_complete_when_training_uses_it() -> None:
    for decoded in map(wait_for_batch, on_side_stream(slow_steps(torch.device("cuda", 0)), torch.device("cuda", 0))):
        assert all((part == decoded.step).all() for part in vars(decoded.batch).values())


def test_a_batch_of_the_cpu_needs_no_wait() -> None:
    decoded = DecodedStep(3, TubeletBatch(*[torch.zeros(1)] * 5), 0, [], {})
    assert wait_for_batch(decoded) is decoded

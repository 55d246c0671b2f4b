from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dataloading.loader.cuda_stream import arrived, beside_training
from dataloading.loader.step_jobs import DecodedStep
from mcl_dist.batch import TubeletBatch


def slowly_made(device: torch.device) -> Iterator[DecodedStep]:
    """Steps whose batches hold their number, long after the host has gone on."""
    for step in range(4):
        work = torch.eye(4096, device=device)
        for _ in range(50):
            work = work @ work
        number = (work[0, 0] * step).expand(2, 4)
        parts = {name: number.clone() for name in ("views", "motion", "order", "samples", "boxes")}
        yield DecodedStep(step, TubeletBatch(**parts), 0, [], {})


@pytest.mark.gpu
def test_a_batch_made_beside_training_is_whole_when_training_uses_it() -> None:
    for made in map(arrived, beside_training(slowly_made(torch.device("cuda", 0)), torch.device("cuda", 0))):
        assert all((part == made.step).all() for part in vars(made.batch).values())


def test_a_batch_made_on_the_cpu_is_handed_over_as_it_is() -> None:
    made = DecodedStep(3, TubeletBatch(*[torch.zeros(1)] * 5), 0, [], {})
    assert arrived(made) is made

from __future__ import annotations

import pytest
import torch

from mcl_dist.training.pending_step import AsyncScalars


def test_values_are_returned_by_name_and_as_of_the_copy() -> None:
    loss = torch.tensor(1.5, requires_grad=True)
    scalars = AsyncScalars({"loss": loss, "taken": torch.tensor(True)})
    loss.data.fill_(9.0)
    assert scalars.wait() == {"loss": 1.5, "taken": 1.0}


@pytest.mark.gpu
def test_copying_does_not_wait_for_the_gpu() -> None:
    loss = torch.full((), 1.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalars = AsyncScalars({"loss": loss})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scalars.wait() == {"loss": 1.5}

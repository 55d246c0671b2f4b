from __future__ import annotations

import pytest
import torch

from mcl_dist.training.async_scalars import AsyncScalars


def test_numbers_come_back_by_name_and_do_not_change_afterwards() -> None:
    loss = torch.tensor(1.5, requires_grad=True)
    readback = AsyncScalars({"loss": loss, "taken": torch.tensor(True)})
    loss.data.fill_(9.0)
    assert readback.numbers() == {"loss": 1.5, "taken": 1.0}


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    loss = torch.full((), 1.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        readback = AsyncScalars({"loss": loss})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert readback.numbers() == {"loss": 1.5}

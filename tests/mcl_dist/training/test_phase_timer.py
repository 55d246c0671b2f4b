from __future__ import annotations

import time

import pytest
import torch

from mcl_dist.training.phase_timer import PhaseTimer


def test_pieces_of_a_phase_add_up_and_all_phases_make_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((1.0, 1.5, 3.5, 4.0, 5.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = PhaseTimer(torch.device("cpu"))
    for phase in ("wait", "forward", "backward", "forward"):
        clock.mark(phase)
    assert clock.seconds() == {"wait": 0.5, "forward": 3.0, "backward": 0.5}


@pytest.mark.gpu
def test_a_gpu_is_waited_for_only_when_the_clock_is_read() -> None:
    device = torch.device("cuda")
    values = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    clock = PhaseTimer(device)
    for _ in range(20):
        values = values @ values
    clock.mark("forward")
    asked = time.perf_counter() - started
    assert clock.seconds()["forward"] > 2 * asked

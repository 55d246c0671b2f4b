from __future__ import annotations

import time

import pytest
import torch

from mcl_dist.training.phase_timer import PhaseTimer


def test_pieces_of_a_phase_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((1.0, 1.5, 3.5, 4.0, 5.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = PhaseTimer(torch.device("cpu"))
    for phase in ("wait", "forward", "backward", "forward"):
        timer.mark(phase)
    assert timer.seconds() == {"wait": 0.5, "forward": 3.0, "backward": 0.5}


@pytest.mark.gpu
def test_only_reading_the_timer_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    values = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    timer = PhaseTimer(device)
    for _ in range(20):
        values = values @ values
    timer.mark("forward")
    dispatched = time.perf_counter() - started
    assert timer.seconds()["forward"] > 2 * dispatched

from __future__ import annotations

import threading
import time
from itertools import count

import pytest
import torch
from safetensors.torch import load as from_bytes

from mcl_dist.checkpoint.staging import StagingBuffer

SECONDS = 30.0


def test_training_waits_for_the_deferred_copy_before_it_changes_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    immediate, deferred = torch.zeros(1000), torch.zeros(1000)
    buffer = StagingBuffer(torch.device("cpu"))
    buffer.stage({"immediate": {"x": immediate}, "deferred": {"x": deferred}}, deferred={"deferred"})
    immediate += 1
    is_waiting, is_over = threading.Event(), threading.Event()
    ticks = count()

    def perf_counter() -> float:
        """Called at the begin of the wait and at the end of the copy."""
        is_waiting.set()
        return float(next(ticks))

    def train() -> None:
        buffer.wait()
        is_over.set()
        deferred.add_(1)

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    training = threading.Thread(target=train)
    training.start()
    assert is_waiting.wait(SECONDS)
    assert not is_over.is_set()
    buffer.copy_deferred()
    training.join(SECONDS)
    assert is_over.is_set()
    assert buffer.seconds_waited() == 1.0
    for name, data in buffer.files().items():
        assert bytes(data[-4000:]) == bytes(4000), name


def test_without_deferred_tensors_training_does_not_wait() -> None:
    buffer = StagingBuffer(torch.device("cpu"))
    buffer.stage({"immediate": {"x": torch.zeros(1)}})
    buffer.wait()
    assert buffer.seconds_waited() == 0


def test_a_failed_copy_ends_the_wait() -> None:
    tensor = torch.zeros(4)
    buffer = StagingBuffer(torch.device("cpu"))
    buffer.stage({"deferred": {"x": tensor}}, deferred={"deferred"})
    tensor.resize_(5)
    with pytest.raises(RuntimeError):
        buffer.copy_deferred()
    buffer.wait()


@pytest.mark.gpu
def test_on_a_gpu_the_stream_of_training_waits() -> None:
    device = torch.device("cuda")
    buffer = StagingBuffer(device)
    tensors = {str(number): torch.full((1 << 24,), float(number), device=device) for number in range(8)}
    factors = torch.randn(4096, 4096, device=device)
    buffer.stage({"file": tensors})  # allocates the memory
    for _ in range(3):
        for _ in range(20):
            factors = torch.nn.functional.normalize(factors @ factors)  # keeps the stream busy before the fills
        for number, tensor in enumerate(tensors.values()):
            tensor.fill_(float(number))
        buffer.stage({"file": tensors}, deferred={"file"})
        copying = threading.Thread(target=buffer.copy_deferred)
        copying.start()
        buffer.wait()
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        copying.join()
        copied = from_bytes(bytes(buffer.files()["file"]))
        for number, name in enumerate(tensors):
            assert bool((copied[name] == number).all()), number
        assert buffer.seconds_waited() > 0

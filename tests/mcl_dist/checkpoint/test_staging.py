from __future__ import annotations

import threading

import pytest
import torch

from mcl_dist.checkpoint.staging import StagingBuffer

SECONDS = 30.0


def test_what_is_copied_later_may_be_changed_once_the_wait_is_over() -> None:
    now, later = torch.zeros(1000), torch.zeros(1000)
    copy = StagingBuffer(torch.device("cpu"))
    copy.take({"now": {"x": now}, "later": {"x": later}}, later={"later"})
    now += 1
    is_over = threading.Event()

    def train() -> None:
        copy.wait()
        is_over.set()
        later.add_(1)

    training = threading.Thread(target=train)
    training.start()
    while copy._waiting_since is None:
        assert training.is_alive()
    assert not is_over.is_set()
    copy.fill()
    training.join(SECONDS)
    assert is_over.is_set()
    assert copy.seconds_waited() > 0
    for name, data in copy.files().items():
        assert bytes(data[-4000:]) == bytes(4000), name


def test_nobody_waits_where_nothing_is_left_to_copy() -> None:
    copy = StagingBuffer(torch.device("cpu"))
    copy.take({"now": {"x": torch.zeros(1)}})
    copy.wait()
    assert copy.seconds_waited() == 0


def test_a_wait_for_a_copy_that_failed_ends() -> None:
    copy = StagingBuffer(torch.device("cpu"))
    copy.take({"later": {"x": torch.zeros(4)}}, later={"later"})
    copy._later = [(torch.zeros(4), torch.zeros(5))]
    with pytest.raises(RuntimeError):
        copy.fill()
    copy.wait()


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_stream_of_training_that_waits() -> None:
    device = torch.device("cuda")
    copy = StagingBuffer(device)
    tensors = {str(number): torch.full((1 << 24,), float(number), device=device) for number in range(8)}
    factors = torch.randn(4096, 4096, device=device)
    copy.take({"file": tensors})  # makes the memory
    for _ in range(3):
        for _ in range(20):
            factors = torch.nn.functional.normalize(factors @ factors)  # what the tensors hold is decided late
        for number, tensor in enumerate(tensors.values()):
            tensor.fill_(float(number))
        copy.take({"file": tensors}, later={"file"})
        filling = threading.Thread(target=copy.fill)
        filling.start()
        copy.wait()
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        filling.join()
        copy.files()
        for number, view in enumerate(copy._files["file"].views[name] for name in tensors):
            assert bool((view == number).all()), number
        assert copy.seconds_waited() > 0

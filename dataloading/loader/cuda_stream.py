"""A GPU's work on coming batches, beside its work on the present one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from dataloading.loader.step_jobs import DecodedStep


def beside_training(steps: Iterable[DecodedStep], device: torch.device) -> Iterator[DecodedStep]:
    """The steps, their kernels and copies in a CUDA stream of their own; for the thread that makes them."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for made in steps:
            yield replace(made, ready=stream.record_event())


def arrived(made: DecodedStep) -> DecodedStep:
    """The step for the thread that trains on it: its stream waits for the batch, the host does not."""
    if made.ready is not None:
        present = torch.cuda.current_stream(made.batch.views.device)
        present.wait_event(made.ready)
        for tensor in vars(made.batch).values():
            tensor.record_stream(present)  # its memory is not made use of again before this stream is done with it
    return made

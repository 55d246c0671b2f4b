"""GPU work on coming batches in a stream of its own, concurrent with training."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from dataloading.loader.step_jobs import DecodedStep


def on_side_stream(steps: Iterable[DecodedStep], device: torch.device) -> Iterator[DecodedStep]:
    """The steps, with their kernels and copies in a CUDA stream of their own; for the thread that makes the steps."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for decoded in steps:
            yield replace(decoded, ready=stream.record_event())


def wait_for_batch(decoded: DecodedStep) -> DecodedStep:
    """Make the current stream, not the host, wait for the batch; for the thread that trains on it."""
    if decoded.ready is not None:
        stream = torch.cuda.current_stream(decoded.batch.views.device)
        stream.wait_event(decoded.ready)
        for tensor in vars(decoded.batch).values():
            tensor.record_stream(stream)  # the allocator reuses its memory only when this stream is done with it
    return decoded

"""Asynchronous copies of scalars from the device to the host."""

from collections.abc import Mapping

import torch


class AsyncScalars:
    """Scalars that are copied to the host once the device has computed them; neither waits for the other.

    Args:
        values: scalars on one device, of any dtype.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._names = list(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._copied: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._values = torch.empty(stacked.shape, pin_memory=True).copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._values = stacked

    def wait(self) -> dict[str, float]:
        """Wait for the copy and return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))

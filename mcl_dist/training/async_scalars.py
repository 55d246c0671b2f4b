"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class AsyncScalars:
    """Scalars that the device has yet to compute, copied as it gets to them; asking for them later stalls nobody.

    Args:
        values: scalars on one device, of any dtype.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._names = list(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._arrived: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._numbers = torch.empty(stacked.shape, pin_memory=True).copy_(stacked, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._numbers = stacked

    def numbers(self) -> dict[str, float]:
        """The values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))

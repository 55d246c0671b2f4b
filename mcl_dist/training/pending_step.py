"""A step between its dispatch and its report, with scalars that are copied to the host meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mcl_dist.distributed.process_group import ProcessGroup, copy_to_device
from mcl_dist.training.anomalies import NonFiniteAttribution
from mcl_dist.training.phase_timer import PhaseTimer


class AsyncScalars:
    """Scalars of any dtype, copied to the host once the device has computed them; neither waits for the other."""

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


@dataclass
class PendingStep:
    """A dispatched step that the device may still execute; the host reads its result after the next dispatch.

    Attributes:
        step: counted from 0.
        scalars: means over ranks: the objective's report, `gradient_norm`, `taken`, `waited` and `stop`.
        non_finite: evidence for the attribution of a skipped step to samples.
        num_videos: in the global batch.
        seconds: wall time.
    """

    step: int
    scalars: AsyncScalars
    non_finite: NonFiniteAttribution
    num_videos: int
    timer: PhaseTimer
    seconds: float = 0.0


def mean_report(
    reports: list[dict[str, torch.Tensor]], group: ProcessGroup, *, waited: float, stop: bool
) -> dict[str, torch.Tensor]:
    """Means over ranks of the objective's reports of all parts, of the seconds `waited`, and of the request to `stop`.

    The host does not wait for the device.
    """
    values = torch.stack([torch.stack([value.float() for value in report.values()]) for report in reports]).mean(0)
    own = copy_to_device(values.device, torch.tensor([waited, stop]))
    means = group.mean(torch.cat([values, own]))
    return dict(zip([*reports[0], "waited", "stop"], means.unbind(), strict=True))

"""What keeps a run from learning nonsense: steps that are not finite, and losses that leap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from mcl_dist.batch import Batch
from mcl_dist.distributed.process_group import ProcessGroup

NOT_FINITE = (
    "its pixels or its motion target are not finite",
    "the loss of its rank is not finite",
    "the gradient is not finite, the fault of any of them",
)


@dataclass(frozen=True)
class NonFiniteSamples:
    """Samples to which a step that was not finite leads, and how."""

    samples: list[int]
    reason: str


class NonFiniteAttribution:
    """One rank's samples of a step, with what speaks against them; on the device until somebody asks.

    Args:
        batch: what the rank trained on.
        losses: of the rank's forward passes, (parts,).
    """

    def __init__(self, batch: Batch, losses: torch.Tensor) -> None:
        inputs = torch.stack([_broken(tensor) for tensor in vars(batch).values()]).any(dim=0)
        loss = (~torch.isfinite(losses)).any().expand_as(inputs)
        self._rows = torch.stack([batch.samples.to(inputs.device), inputs.long(), loss.long()], dim=1)

    def blame(self, group: ProcessGroup) -> NonFiniteSamples:
        """The narrowest set that explains the step; all ranks must ask together."""
        rows = group.gather(self._rows).cpu()
        everyone, *evidence = rows.unbind(dim=1)
        for against, reason in zip(evidence, NOT_FINITE, strict=False):
            if against.any():
                return NonFiniteSamples(everyone[against > 0].tolist(), reason)
        return NonFiniteSamples(everyone.tolist(), NOT_FINITE[-1])


def _broken(values: torch.Tensor) -> torch.Tensor:
    """Which rows of (B, …) hold NaN or infinity; bytes never do, and are not read."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    return ~torch.isfinite(values).flatten(1).all(dim=1)


class SpikeDetector:
    """Tells a loss that lies far above those before it: above their median by a multiple of the usual deviation.

    The deviation is the median absolute one (MAD), which a few outliers do not move. Of losses that stay high only the
    first is told; they become the usual ones when they fill half of the window.

    Args:
        window: losses that make the usual; there is no verdict before so many were seen.
        factor: multiple of the MAD.
    """

    def __init__(self, window: int, factor: float) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._factor = factor
        self._is_high = False

    def limit_passed(self, loss: float) -> float | None:
        """Take note of a loss; the limit, where it passed that and the loss before did not."""
        limit = self._limit()
        was_high, self._is_high = self._is_high, limit is not None and loss > limit
        self._recent.append(loss)
        return limit if self._is_high and not was_high else None

    @property
    def memory(self) -> tuple[tuple[float, ...], bool]:
        """The losses in the window, and whether the last one passed its limit."""
        return tuple(self._recent), self._is_high

    def remember(self, recent: Iterable[float], *, is_high: bool) -> None:
        """Take over the `memory` of another."""
        self._recent.extend(recent)
        self._is_high = is_high

    def forget(self) -> None:
        """Start anew."""
        self._recent.clear()
        self._is_high = False

    def _limit(self) -> float | None:
        if len(self._recent) < (self._recent.maxlen or 0):
            return None
        middle = median(self._recent)
        return middle + self._factor * median(abs(loss - middle) for loss in self._recent)

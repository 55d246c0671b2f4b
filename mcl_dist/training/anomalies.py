"""Detection of training anomalies: steps that are not finite, and loss spikes."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from mcl_dist.batch import Batch
from mcl_dist.distributed.process_group import ProcessGroup

REASONS = (
    "non-finite pixels or motion target",
    "non-finite loss on the rank of these videos",
    "non-finite gradient, which any video of the step may cause",
)


@dataclass(frozen=True)
class NonFiniteSamples:
    """Samples that may have caused a non-finite step, and why these."""

    samples: list[int]
    reason: str


class NonFiniteAttribution:
    """One rank's evidence for the attribution of a non-finite step to samples; it stays on the device until then.

    `batch` and `losses` (parts,) are those of the step on this rank.
    """

    def __init__(self, batch: Batch, losses: torch.Tensor) -> None:
        inputs = torch.stack([_non_finite_rows(tensor) for tensor in vars(batch).values()]).any(dim=0)
        loss = (~torch.isfinite(losses)).any().expand_as(inputs)
        self._rows = torch.stack([batch.samples.to(inputs.device), inputs.long(), loss.long()], dim=1)

    def attribute(self, group: ProcessGroup) -> NonFiniteSamples:
        """The smallest set of samples that explains the step; all ranks must call it together."""
        rows = group.gather(self._rows).cpu()
        samples, *evidence = rows.unbind(dim=1)
        for flags, reason in zip(evidence, REASONS, strict=False):
            if flags.any():
                return NonFiniteSamples(samples[flags > 0].tolist(), reason)
        return NonFiniteSamples(samples.tolist(), REASONS[-1])


def _non_finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Which rows of (B, …) hold NaN or infinity; integers never do and are not read."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    return ~torch.isfinite(values).flatten(1).all(dim=1)


class SpikeDetector:
    """Detects losses above the median of recent ones by more than a multiple of their median absolute deviation (MAD).

    The MAD is robust to a few outliers. Of consecutive high losses only the first is a spike; they become the new
    normal once they fill half of the window. There is no limit before `window` losses were observed.
    """

    def __init__(self, window: int, factor: float) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._factor = factor
        self._is_high = False

    def observe(self, loss: float) -> float | None:
        """Add a loss; returns the limit if the loss exceeds it and the previous loss did not."""
        limit = self._limit()
        was_high, self._is_high = self._is_high, limit is not None and loss > limit
        self._recent.append(loss)
        return limit if self._is_high and not was_high else None

    @property
    def state(self) -> tuple[tuple[float, ...], bool]:
        """The losses in the window, and whether the last one exceeded its limit."""
        return tuple(self._recent), self._is_high

    def load_state(self, recent: Iterable[float], *, is_high: bool) -> None:
        """Load the `state` of another detector."""
        self._recent.extend(recent)
        self._is_high = is_high

    def reset(self) -> None:
        """Discard all losses."""
        self._recent.clear()
        self._is_high = False

    def _limit(self) -> float | None:
        if len(self._recent) < (self._recent.maxlen or 0):
            return None
        middle = median(self._recent)
        return middle + self._factor * median(abs(loss - middle) for loss in self._recent)

"""Time of a step by phase, measured on the device."""

import time
from typing import Any

import torch


class PhaseTimer:
    """Time of a step by phase; starts when it is created. Marking the end of a phase waits for nothing.

    On a GPU the marks are events in its stream: a phase lasts while the device executes it or waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # phase, and a CUDA event or seconds
        self.mark("")

    def mark(self, phase: str) -> None:
        """Mark the end of a phase, or of a further piece of it; it began at the previous mark."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, in the order of first marks; waits until the device has passed the last mark."""
        spent = dict.fromkeys((phase for phase, _ in self._marks[1:]), 0.0)
        for (_, start), (phase, end) in zip(self._marks[:-1], self._marks[1:], strict=True):
            spent[phase] += self._between(start, end)
        return spent

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._is_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

"""When the phases of a step end, by the device's own clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class PhaseTimer:
    """Where the time of a step goes; marking a phase's end waits for nothing, and no device for it.

    On a GPU the marks are events in its stream: a phase lasts for as long as the device is at it, or waits for it. The
    clock starts when it is made.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # a CUDA event, or seconds
        self.mark("")

    def mark(self, phase: str) -> None:
        """A phase, or one more piece of it, ends here; it began at the mark before."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase, in the order of their first marks; to be asked when the device is past the last mark."""
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

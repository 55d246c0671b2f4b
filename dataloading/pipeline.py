"""Decoding: the only place that knows DALI."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from mcl_dist.errors import UserError

# Windows scaled to another size miss whole pixels by this at most.
_ROUNDING = 1e-6


class StillDecoder:
    """Decodes windows of JPEG stills and resizes each bilinearly to one size.

    On a CUDA device nvJPEG decodes ("mixed"), else the CPU does. Stills and windows may differ in size from
    one to the next; any number of stills may be asked for, `max_batch` at a time are worked on.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        grey: bool,
        device: torch.device,
        threads: int,
        max_batch: int = 256,
    ) -> None:
        self._size = size
        self._channels = 1 if grey else 3
        self._device = device
        self._max_batch = max_batch
        on_gpu = device.type == "cuda"
        # DALI resizes colour on a CPU six times slower than PyTorch; grey it does as fast, and fractions.
        self._resized_by_dali = on_gpu or grey
        self._pipeline: Any = pipeline_def(_graph)(
            size=size if self._resized_by_dali else None,
            output_type=types.GRAY if grey else types.RGB,
            decoder="mixed" if on_gpu else "cpu",
            batch_size=max_batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def __call__(self, stills: Sequence[np.ndarray], windows: np.ndarray) -> torch.Tensor:
        """Decode `windows`, (N, 4) top, left, height, width in pixels of each still.

        Args:
            stills: N encoded stills, uint8 (bytes,).
            windows: what to decode and resize of each still; fractions of pixels for grey stills only.

        Returns:
            uint8 (N, height, width, 3), or 1 for grey, on the device.

        Raises:
            UserError: DALI cannot decode a still; the decoder is of no use afterwards.
        """
        decoded = torch.empty((len(stills), *self._size, self._channels), dtype=torch.uint8, device=self._device)
        for first in range(0, len(stills), self._max_batch):
            part = slice(first, first + self._max_batch)
            batch = self._run(stills[part], windows[part])
            if self._resized_by_dali:
                decoded[part] = torch.utils.dlpack.from_dlpack(batch.as_tensor())
            else:
                self._resize(batch, windows[part], decoded[part])
        return decoded

    def close(self) -> None:
        """Let DALI's threads go."""
        self._pipeline = None

    def _run(self, stills: Sequence[np.ndarray], windows: np.ndarray) -> Any:
        """DALI's list of the decoded windows, resized if it is to do that."""
        top_left, size = windows[:, :2], windows[:, 2:]
        # Whole pixels are decoded; where a window has fractions, the resize samples inside them.
        start = np.floor(top_left + _ROUNDING).astype(np.int32)
        inputs = {"start": start, "shape": np.ceil(top_left + size - _ROUNDING).astype(np.int32) - start}
        if self._resized_by_dali:
            low = (top_left - start).astype(np.float32)
            inputs |= {"low": low, "high": low + size.astype(np.float32)}
        try:
            (batch,) = self._pipeline.run(stills=list(stills), **inputs)
        except RuntimeError as error:
            raise UserError(f"DALI cannot decode a still ({_reason(error)})") from error
        return batch

    def _resize(self, batch: Any, windows: np.ndarray, out_nhwc: torch.Tensor) -> None:
        """Resize neighbours of one window together: the frames of a clip have the same."""
        place = range(len(windows))
        for _, group in itertools.groupby(place, key=lambda still: windows[still].tobytes()):
            run = list(group)
            pixels_nhwc = torch.stack([torch.utils.dlpack.from_dlpack(batch[still]) for still in run])
            resized = F.interpolate(pixels_nhwc.permute(0, 3, 1, 2), size=self._size, mode="bilinear")
            out_nhwc[run[0] : run[-1] + 1] = resized.permute(0, 2, 3, 1)


def _reason(error: RuntimeError) -> str:
    """DALI tells a story of many lines; what happened is the first after `encountered:`."""
    story = str(error).partition("encountered:")[2] or str(error)
    return story.strip().splitlines()[0]


def _graph(size: tuple[int, int] | None, output_type: Any, decoder: str) -> Any:
    """What DALI is to do, resizing only to a given size."""
    encoded = fn.external_source(name="stills", dtype=types.UINT8, ndim=1)
    start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
    window = fn.decoders.image_slice(
        encoded, start=start, shape=shape, axis_names="HW", device=decoder, output_type=output_type
    )
    if size is None:
        return window
    low, high = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("low", "high"))
    # Plain bilinear sampling as METHOD.md's section 2 has it, not an average over the area.
    return fn.resize(
        window,
        size=size,
        interp_type=types.INTERP_LINEAR,
        antialias=False,
        roi_start=low,
        roi_end=high,
    )

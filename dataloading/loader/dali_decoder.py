"""Decoding of JPEG stills; the only module that uses DALI."""

import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from mcl_dist.errors import UserError

_ROUNDING = 1e-6  # largest rounding error of a scaled window's edges, in pixels
_CUTS = 2  # windows of a still in one pass of the GPU's pipeline


class StillDecoder:
    """Decodes each JPEG still once, cuts windows out of it, and resizes each bilinearly to one size.

    On a CUDA device nvJPEG decodes ("mixed", `hardware_share` of it on the hardware decoder, if there is one) and DALI
    resizes. On a CPU DALI decodes the span of a still's windows, and OpenCV resizes, which is several times faster than
    DALI. Stills and windows may differ in size. A call takes any number of stills and processes `max_batch` at a time.
    `dali_resizes` overrides the choice between DALI and OpenCV.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int],
        grey: bool,
        device: torch.device,
        threads: int,
        max_batch: int = 256,
        hardware_share: float = 0.65,
        dali_resizes: bool | None = None,
    ) -> None:
        self._size = size
        self._channels = 1 if grey else 3
        self._device = device
        self._max_batch = max_batch
        on_gpu = device.type == "cuda"
        self._dali_resizes = on_gpu if dali_resizes is None else dali_resizes
        self._options = {
            "size": size if self._dali_resizes else None,
            "output_type": types.GRAY if grey else types.RGB,
            "on_gpu": on_gpu,
            "hardware_share": hardware_share,
            "batch_size": max_batch,
            "num_threads": threads,
            "device_id": (device.index or 0) if on_gpu else None,
            "prefetch_queue_depth": 1,
        }
        self._pipeline: Any = None
        self._build()

    def __call__(
        self, stills: Sequence[np.ndarray], windows: np.ndarray, still_index: np.ndarray | None = None
    ) -> torch.Tensor:
        """Cut `windows` out of the stills.

        Args:
            stills: M encoded stills, uint8 (bytes,).
            windows: (N, 4) top, left, height, width in pixels, which may be fractions.
            still_index: int (N,), the still of each window; every still has one. None: one window per still.

        Returns:
            uint8 (N, height, width, 3), or 1 channel for grey, on the device.

        Raises:
            UserError: DALI cannot decode a still.
        """
        still_index = np.arange(len(windows)) if still_index is None else still_index
        cut = torch.empty((len(windows), *self._size, self._channels), dtype=torch.uint8, device=self._device)
        self.into(cut, stills, windows, still_index)
        return cut

    def into(
        self, cut: torch.Tensor, stills: Sequence[np.ndarray], windows: np.ndarray, still_index: np.ndarray
    ) -> None:
        """As `__call__`, but into `cut`, uint8 (N, height, width, channels) on the device."""
        order = np.argsort(still_index, kind="stable")
        edges = np.searchsorted(still_index[order], np.arange(0, len(stills) + self._max_batch, self._max_batch))
        cut_batch = self._cut_with_dali if self._dali_resizes else self._cut_with_opencv
        for part, (begin, end) in enumerate(itertools.pairwise(edges)):
            first = part * self._max_batch
            rows = order[begin:end]  # of this batch's windows
            batch = stills[first : first + self._max_batch]
            if len(batch):
                cut_batch(cut, batch, windows[rows], still_index[rows] - first, rows)

    def close(self) -> None:
        """Stop DALI's threads."""
        self._pipeline = None

    def _build(self) -> None:
        self._pipeline = pipeline_def(_graph)(**self._options)
        self._pipeline.build()

    def _run(self, stills: Sequence[np.ndarray], **inputs: Any) -> Any:
        """The outputs of DALI's graph for the stills."""
        try:
            contiguous = {name: np.ascontiguousarray(values) for name, values in inputs.items()}
            return self._pipeline.run(stills=list(stills), **contiguous)
        except RuntimeError as error:
            self._build()  # a failed pipeline cannot be used again
            raise UserError(f"DALI cannot decode a still ({_reason(error)})") from error

    def _cut_with_opencv(
        self,
        cut: torch.Tensor,
        stills: Sequence[np.ndarray],
        windows: np.ndarray,
        still_index: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        spans = _spans(_whole_pixels(windows), still_index, len(stills))
        (batch,) = self._run(stills, start=spans[:, :2], shape=spans[:, 2:] - spans[:, :2])
        out = cut.numpy()
        for row, window, still in zip(rows, windows, still_index, strict=True):
            _resize(batch.at(int(still)), window, spans[still], out[row])

    def _cut_with_dali(
        self,
        cut: torch.Tensor,
        stills: Sequence[np.ndarray],
        windows: np.ndarray,
        still_index: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        """Cut `_CUTS` windows out of each still in a pass; a still with more windows is decoded again."""
        number_in_still = np.arange(len(still_index)) - np.searchsorted(still_index, still_index)
        for first in range(0, int(number_in_still.max()) + 1, _CUTS):
            selected = np.flatnonzero((number_in_still >= first) & (number_in_still < first + _CUTS))
            cut_number = number_in_still[selected] - first
            needed, entry = np.unique(still_index[selected], return_inverse=True)
            # Unused cuts of a still repeat one of its windows.
            table = np.zeros((_CUTS, len(needed), 4))
            table[:, entry] = windows[selected]
            table[cut_number, entry] = windows[selected]
            for number, cuts in enumerate(self._cuts([stills[still] for still in needed], table)):
                used = cut_number == number
                target, source = (torch.from_numpy(each[used]).to(cut.device) for each in (rows[selected], entry))
                cut[target] = cuts[source]
            if cut.is_cuda:
                # DALI reuses its buffers in its next run, without regard to this stream.
                torch.cuda.current_stream(cut.device).synchronize()

    def _cuts(self, stills: Sequence[np.ndarray], table: np.ndarray) -> list[torch.Tensor]:
        """Cut the windows of `table`, (cuts, M, 4), out of the M stills; uint8 (M, h, w, channels) for each cut."""
        whole = np.stack([_whole_pixels(windows) for windows in table])
        spans = np.concatenate([whole[..., :2].min(axis=0), whole[..., 2:].max(axis=0)], axis=1)
        inputs = {"start": spans[:, :2], "shape": spans[:, 2:] - spans[:, :2]}
        for number, (edges, windows) in enumerate(zip(whole, table, strict=True)):
            low = (windows[:, :2] - edges[:, :2]).astype(np.float32)
            inputs[f"start{number}"] = edges[:, :2] - spans[:, :2]
            inputs[f"shape{number}"] = edges[:, 2:] - edges[:, :2]
            inputs[f"low{number}"], inputs[f"high{number}"] = low, low + windows[:, 2:].astype(np.float32)
        outputs = self._run(stills, **inputs)
        return [torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in outputs]


def _whole_pixels(windows: np.ndarray) -> np.ndarray:
    """Top, left, bottom, right of the whole pixels that windows touch, int32 (N, 4)."""
    top_left, size = windows[:, :2], windows[:, 2:]
    edges = np.concatenate([np.floor(top_left + _ROUNDING), np.ceil(top_left + size - _ROUNDING)], axis=1)
    return edges.astype(np.int32)


def _spans(edges: np.ndarray, still_index: np.ndarray, num_stills: int) -> np.ndarray:
    """Top, left, bottom, right of the bounding box of each still's windows, int32 (num_stills, 4)."""
    spans = np.tile(np.array([2**30, 2**30, 0, 0], dtype=np.int32), (num_stills, 1))
    np.minimum.at(spans[:, :2], still_index, edges[:, :2])
    np.maximum.at(spans[:, 2:], still_index, edges[:, 2:])
    return spans


def _resize(span_hwc: np.ndarray, window: np.ndarray, span: np.ndarray, out_hwc: np.ndarray) -> None:
    """Bilinear sampling as in METHOD.md, section 2: no average over the area, no bleeding from outside the window."""
    top, left, bottom, right = _whole_pixels(window[None])[0]
    pixels = span_hwc[top - span[0] : bottom - span[0], left - span[1] : right - span[1]]
    height, width = out_hwc.shape[:2]
    if (bottom - top, right - left) == (window[2], window[3]):
        cv2.resize(pixels, (width, height), dst=out_hwc, interpolation=cv2.INTER_LINEAR)
        return
    down, across = window[2] / height, window[3] / width
    to_source = np.array(
        [[across, 0, window[1] - left + across / 2 - 0.5], [0, down, window[0] - top + down / 2 - 0.5]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(pixels, to_source, (width, height), dst=out_hwc, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _reason(error: RuntimeError) -> str:
    """The cause in DALI's message of many lines: the first line after `encountered:`."""
    message = str(error).partition("encountered:")[2] or str(error)
    return message.strip().splitlines()[0]


def _graph(size: tuple[int, int] | None, output_type: Any, on_gpu: bool, hardware_share: float) -> Any:
    """DALI's graph: decode the span of each still and, given a size, cut windows out of it and resize them."""
    encoded = fn.external_source(name="stills", dtype=types.UINT8, ndim=1)
    start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
    decoder: dict[str, Any] = {"device": "cpu"}
    if on_gpu:
        # Interpolate chroma as libjpeg does on a CPU; by default nvJPEG repeats its pixels.
        decoder = {"device": "mixed", "hw_decoder_load": hardware_share, "jpeg_fancy_upsampling": True}
    span = fn.decoders.image_slice(
        encoded, start=start, shape=shape, axis_names="HW", output_type=output_type, **decoder
    )
    if size is None:
        return span
    return tuple(_window(span, number, size) for number in range(_CUTS))


def _window(span: Any, number: int, size: tuple[int, int]) -> Any:
    """One window of each span; slicing it first avoids bleeding from outside the window."""
    start, shape = (fn.external_source(name=f"{n}{number}", dtype=types.INT32, ndim=1) for n in ("start", "shape"))
    low, high = (fn.external_source(name=f"{n}{number}", dtype=types.FLOAT, ndim=1) for n in ("low", "high"))
    window = fn.slice(span, start=start, shape=shape, axis_names="HW")
    return fn.resize(window, size=size, interp_type=types.INTERP_LINEAR, antialias=False, roi_start=low, roi_end=high)

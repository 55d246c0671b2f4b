"""Tensors copied to host memory as the bytes of safetensors files, while training goes on."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch

from mcl_dist.checkpoint.state import Tensors

ALIGNMENT = 64  # bytes at which the tensors begin, so that any type may
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

Layout = dict[str, tuple[torch.dtype, torch.Size]]


class StagingBuffer:
    """Host memory for what a rank writes, made at the first use and filled anew by each later one.

    What changes in a forward is copied at once. The rest a thread copies while training goes on, which waits before it
    changes any of it. On a GPU the memory is pinned and the thread's copies have a stream of their own: there it is the
    stream of training that waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._files: dict[str, _TensorFile] = {}
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []  # to, from; kept while a device may read them
        self._is_owed = False
        self._is_filled = threading.Event()
        self._filled_at = 0.0
        self._copied: Any = None  # these three are of a GPU
        self._reached: Any = None
        self._released: Any = None
        self._waiting_since: float | None = None

    @torch.no_grad()
    def take(self, files: Mapping[str, Tensors], later: Collection[str] = ()) -> None:
        """Copy the tensors, those of the files in `later` by `fill`; those of the copy before are gone."""
        for name in self._files.keys() - files.keys():
            del self._files[name]
        self._later = []
        for name, tensors in files.items():
            layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
            if name not in self._files or self._files[name].layout != layout:
                self._files[name] = _TensorFile(layout, pinned=self._is_gpu)
            pairs = [(view, tensors[key]) for key, view in self._files[name].views.items()]
            if name in later:
                self._later += pairs
            else:
                _copy(pairs)
        self._is_owed = bool(self._later)
        self._is_filled.clear()
        self._waiting_since = self._reached = self._released = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def fill(self) -> None:
        """Copy what `take` has left, in whatever thread."""
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                _copy(self._later)
                if self._is_gpu:
                    self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    self._copied.record()
        finally:
            self._filled_at = time.perf_counter()
            self._is_filled.set()

    def wait(self) -> None:
        """Let training wait until what `take` has left is copied; whatever it does next may change it."""
        if not self._is_owed:
            return
        self._is_owed = False
        if not self._is_gpu:
            self._waiting_since = time.perf_counter()
            self._is_filled.wait()
            return
        reached, released = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        reached.record()
        self._is_filled.wait()
        torch.cuda.current_stream().wait_event(self._copied)
        released.record()
        self._reached, self._released = reached, released

    def seconds_waited(self) -> float:
        """For how long `wait` has kept training, by the device's clock; to be asked once `files` has answered."""
        if self._released is not None:
            self._released.synchronize()
            return float(self._reached.elapsed_time(self._released)) / 1e3
        return 0.0 if self._waiting_since is None else max(0.0, self._filled_at - self._waiting_since)

    def files(self) -> dict[str, memoryview]:
        """The bytes of every file, once they have all arrived; `fill` comes first."""
        if self._copied is not None:
            self._copied.synchronize()
        self._later = []
        return {name: file.buffer.numpy().data for name, file in self._files.items()}


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for view, tensor in pairs:
        view.copy_(tensor, non_blocking=True)


class _TensorFile:
    """A safetensors file: the header's length in 8 bytes, the header, the tensors back to back.

    Attributes:
        views: the tensors in it.
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        places, end = {}, 0
        # The widest types first, as the format's own library has them: all tensors are then aligned.
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            places[name] = (end, end + shape.numel() * dtype.itemsize)
            end = places[name][1]
        header = _header(layout, places)
        self.buffer = _host_memory(len(header) + end, pinned=pinned)
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        tensors = self.buffer[len(header) :]
        self.views = {
            name: tensors[start:stop].view(layout[name][0]).view(layout[name][1])
            for name, (start, stop) in places.items()
        }


def _host_memory(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Zeros; what is not pinned has large pages where Linux has some, into which copies go up to twice as fast."""
    if pinned:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, num_bytes)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _header(layout: Layout, places: Mapping[str, tuple[int, int]]) -> bytes:
    described = {
        name: {"dtype": DTYPES[layout[name][0]], "shape": list(layout[name][1]), "data_offsets": list(place)}
        for name, place in places.items()
    }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

"""Tensors copied to host memory as the bytes of safetensors files: training may go on while these are written."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch

from mcl_dist.checkpoint.content import Tensors

ALIGNMENT = 64  # bytes at which the tensors begin, so that any type may
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

Layout = dict[str, tuple[torch.dtype, torch.Size]]


class HostCopy:
    """Host memory for what a rank writes, made at the first use and filled anew by each later one.

    On a GPU it is pinned, and filled by the stream on which training goes on: that overwrites nothing before it is
    copied, and the host waits for neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._files: dict[str, _TensorFile] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, files: Mapping[str, Tensors]) -> None:
        """Copy the tensors; those of the copy before are gone."""
        for name in self._files.keys() - files.keys():
            del self._files[name]
        for name, tensors in files.items():
            layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
            if name not in self._files or self._files[name].layout != layout:
                self._files[name] = _TensorFile(layout, pinned=self._is_gpu)
            for key, view in self._files[name].views.items():
                view.copy_(tensors[key], non_blocking=True)
        if self._is_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def files(self) -> dict[str, memoryview]:
        """The bytes of every file, once they have all arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return {name: file.buffer.numpy().data for name, file in self._files.items()}


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

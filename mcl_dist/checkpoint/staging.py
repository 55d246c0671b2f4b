"""Staging of tensors in host memory, as the bytes of safetensors files, while training continues."""

import json
import mmap
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch

from mcl_dist.checkpoint.state import Tensors

ALIGNMENT = 64  # of the first tensor, in bytes; suits every data type
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

Layout = dict[str, tuple[torch.dtype, torch.Size]]


class StagingBuffer:
    """Host memory for one rank's files, allocated at the first use and reused by later ones.

    `stage` copies at once the tensors that the next forward pass changes. A thread copies the others with
    `copy_deferred` while training continues; training calls `wait` before it changes any of them. On a GPU the memory
    is pinned, the thread copies on its own stream, and training's stream waits instead of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._files: dict[str, _TensorFile] = {}
        self._deferred: list[tuple[torch.Tensor, torch.Tensor]] = []  # (to, from), kept while a device may read them
        self._is_pending = False
        self._is_copied = threading.Event()
        self._copied_at = 0.0
        self._waiting_since: float | None = None
        # CUDA events: the deferred copy is done; training reached its wait; training continued.
        self._copy_done: Any = None
        self._wait_started: Any = None
        self._wait_ended: Any = None

    @torch.no_grad()
    def stage(self, files: Mapping[str, Tensors], deferred: Collection[str] = ()) -> None:
        """Copy the tensors except those of the files named in `deferred`; replaces the previous contents."""
        for name in self._files.keys() - files.keys():
            del self._files[name]
        self._deferred = []
        for name, tensors in files.items():
            layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
            if name not in self._files or self._files[name].layout != layout:
                self._files[name] = _TensorFile(layout, pinned=self._is_gpu)
            pairs = [(view, tensors[key]) for key, view in self._files[name].views.items()]
            if name in deferred:
                self._deferred += pairs
            else:
                _copy(pairs)
        self._is_pending = bool(self._deferred)
        self._is_copied.clear()
        self._waiting_since = self._wait_started = self._wait_ended = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def copy_deferred(self) -> None:
        """Copy the deferred tensors; any thread may call it."""
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                _copy(self._deferred)
                if self._is_gpu:
                    self._copy_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    self._copy_done.record()
        finally:
            self._copied_at = time.perf_counter()
            self._is_copied.set()

    def wait(self) -> None:
        """Block training until the deferred tensors are copied and may change."""
        if not self._is_pending:
            return
        self._is_pending = False
        if not self._is_gpu:
            self._waiting_since = time.perf_counter()
            self._is_copied.wait()
            return
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record()
        self._is_copied.wait()
        torch.cuda.current_stream().wait_event(self._copy_done)
        ended.record()
        self._wait_started, self._wait_ended = started, ended

    def seconds_waited(self) -> float:
        """Seconds that `wait` has blocked training, on a GPU by the device's clock; call it after `files`."""
        if self._wait_ended is not None:
            self._wait_ended.synchronize()
            return float(self._wait_started.elapsed_time(self._wait_ended)) / 1e3
        return 0.0 if self._waiting_since is None else max(0.0, self._copied_at - self._waiting_since)

    def files(self) -> dict[str, memoryview]:
        """The bytes of every file, once all copies are complete; call it after `copy_deferred`."""
        if self._copy_done is not None:
            self._copy_done.synchronize()
        self._deferred = []
        return {name: file.buffer.numpy().data for name, file in self._files.items()}


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for view, tensor in pairs:
        view.copy_(tensor, non_blocking=True)


class _TensorFile:
    """A safetensors file in memory: 8 bytes with the header's length, the header, the tensors back to back.

    Attributes:
        layout: data types and shapes of the tensors.
        buffer: the file's bytes.
        views: the tensors, as views of the buffer.
    """

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        offsets, end = {}, 0
        # Widest types first, like the safetensors library, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            offsets[name] = (end, end + shape.numel() * dtype.itemsize)
            end = offsets[name][1]
        header = _header(layout, offsets)
        self.buffer = _allocate(len(header) + end, pinned=pinned)
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        tensors = self.buffer[len(header) :]
        self.views = {
            name: tensors[start:stop].view(layout[name][0]).view(layout[name][1])
            for name, (start, stop) in offsets.items()
        }


def _allocate(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Zeroed host memory; unpinned memory uses huge pages where Linux has some: copies are up to twice as fast."""
    if pinned:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, num_bytes)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _header(layout: Layout, offsets: Mapping[str, tuple[int, int]]) -> bytes:
    tensors = {
        name: {"dtype": DTYPES[layout[name][0]], "shape": list(layout[name][1]), "data_offsets": list(span)}
        for name, span in offsets.items()
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

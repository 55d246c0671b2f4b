"""GPU metrics from NVIDIA's management library (NVML) and torch, and the peak FLOP/s of known GPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

# Dense peak in TFLOP/s from NVIDIA's data sheets: (part of the name, bfloat16, TF32). PyTorch computes float32
# convolutions in TF32. The first match counts.
PEAK_TFLOPS = (
    ("B200", 2250.0, 1125.0),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.5),
    ("H100", 989.4, 494.7),
    ("H200", 989.4, 494.7),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
)


class Gpu:
    """One GPU of this machine; values that NVML cannot read are absent.

    Args:
        nvml: the initialised module `pynvml`; None if it is not installed.
        handle: NVML's handle of the GPU.
        allocated: returns the bytes that tensors of this process occupy.
    """

    def __init__(self, nvml: Any, handle: Any, allocated: Callable[[], int]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._allocated = allocated

    @classmethod
    def for_device(cls, device: torch.device) -> Gpu | None:
        """The GPU of a torch device; None for a CPU."""
        if device.type != "cuda":
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        nvml, handle = _nvml(uuid)
        return cls(nvml, handle, lambda: torch.cuda.memory_allocated(device))

    def read(self) -> dict[str, float]:
        """Current values by metric name."""
        values = {"mcl_gpu_memory_allocated_bytes": float(self._allocated())}
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            return values
        queries: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("mcl_gpu_utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            ("mcl_gpu_memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            ("mcl_gpu_memory_size_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            ("mcl_gpu_temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ("mcl_gpu_power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        )
        for name, query in queries:
            with suppress(nvml.NVMLError):  # MIG slices and some GPUs do not support every query
                values[name] = float(query())
        return values


def peak_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU model in a precision; None if the model is not in `PEAK_TFLOPS`.

    Args:
        name: as torch reports it, for example `NVIDIA H100 80GB HBM3`.
        precision: `float32` or `bfloat16`.
    """
    for part, bfloat16, tf32 in PEAK_TFLOPS:
        if part in name:
            return 1e12 * (bfloat16 if precision == "bfloat16" else tf32)
    return None


def _nvml(uuid: str) -> tuple[Any, Any]:
    """NVML and its handle of the GPU with this UUID, whatever CUDA_VISIBLE_DEVICES is; (None, None) without NVML."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None

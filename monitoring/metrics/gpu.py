"""A GPU as NVIDIA's management library (NVML) and torch see it, and what it can do at most."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

# Dense, in 10¹² operations a second, from NVIDIA's data sheets: (part of the name, bfloat16, TF32, in which PyTorch
# convolves float32). The first that fits counts.
PEAKS = (
    ("B200", 2250.0, 1125.0),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.5),
    ("H100", 989.4, 494.7),
    ("H200", 989.4, 494.7),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
)


class Gpu:
    """One GPU of this machine; what NVML cannot tell, or where it is not installed, is absent.

    Args:
        nvml: the module `pynvml`, initialised; None without it.
        handle: what it knows the GPU by.
        allocated: bytes that this process's tensors hold.
    """

    def __init__(self, nvml: Any, handle: Any, allocated: Callable[[], int]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._allocated = allocated

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """That of a device; None for a CPU."""
        if device.type != "cuda":
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        nvml, handle = _nvml(uuid)
        return cls(nvml, handle, lambda: torch.cuda.memory_allocated(device))

    def figures(self) -> dict[str, float]:
        """Values by the names of their metrics."""
        found = {"mcl_gpu_memory_allocated_bytes": float(self._allocated())}
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            return found
        looks: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("mcl_gpu_utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            ("mcl_gpu_memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            ("mcl_gpu_memory_size_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            ("mcl_gpu_temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ("mcl_gpu_power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        )
        for name, look in looks:
            with suppress(nvml.NVMLError):  # a slice of a GPU, or one that knows no power, tells less
                found[name] = float(look())
        return found


def peak_flops(name: str, precision: str) -> float | None:
    """Operations a second that a GPU of that name can do at most in a precision; None where nobody has noted it.

    Args:
        name: as torch tells it, for example `NVIDIA H100 80GB HBM3`.
        precision: `float32` or `bfloat16`.
    """
    for part, bfloat16, tf32 in PEAKS:
        if part in name:
            return 1e12 * (bfloat16 if precision == "bfloat16" else tf32)
    return None


def _nvml(uuid: str) -> tuple[Any, Any]:
    """NVML and its handle of the GPU, whatever of the machine's GPUs this process sees; (None, None) without it."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None

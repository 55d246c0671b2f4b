"""Machine metrics of a process: host memory, disk space and its GPU."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from monitoring.metrics.gpu import Gpu
from monitoring.metrics.registry import Registry

MEMORY = {"MemTotal": "mcl_host_memory_size_bytes", "MemAvailable": "mcl_host_memory_available_bytes"}
MEMORY_FILE = Path("/proc/meminfo")  # Linux only; elsewhere the host memory metrics are absent


def register_machine_metrics(registry: Registry, volumes: Mapping[str, Path], gpu: Gpu | None) -> None:
    """Update the machine metrics at every scrape.

    Args:
        registry: exports the metrics.
        volumes: volume name to a folder on its disk; the folder need not exist yet.
        gpu: the GPU of this process, if any.
    """

    def update() -> None:
        _update_memory(registry)
        for volume, folder in volumes.items():
            _update_disk(registry, volume, folder)
        if gpu is not None:
            for name, value in gpu.read().items():
                registry.set(name, value)

    registry.before_scrape(update)


def _update_memory(registry: Registry) -> None:
    with suppress(OSError):
        for line in MEMORY_FILE.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in MEMORY:
                registry.set(MEMORY[name], int(rest.split()[0]) * 1024)  # /proc/meminfo's kB are KiB


def _update_disk(registry: Registry, volume: str, folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    with suppress(OSError):
        status = os.statvfs(existing)
        registry.set("mcl_disk_size_bytes", status.f_blocks * status.f_frsize, volume)
        registry.set("mcl_disk_free_bytes", status.f_bavail * status.f_frsize, volume)

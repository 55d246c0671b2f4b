"""What a process's machine has left: memory, disks, and the process's GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from monitoring.metrics.gpu import Gpu
from monitoring.metrics.registry import Registry

MEMORY = {"MemTotal": "mcl_host_memory_size_bytes", "MemAvailable": "mcl_host_memory_available_bytes"}
MEMORY_FILE = Path("/proc/meminfo")  # Linux; elsewhere the host's memory is absent


def watch_machine(board: Registry, volumes: Mapping[str, Path], gpu: Gpu | None) -> None:
    """Look at every scrape.

    Args:
        board: what is shown.
        volumes: folders on the disks to be watched, by the name of the volume; they need not be there yet.
        gpu: of this process, if it has one.
    """

    def look() -> None:
        _memory(board)
        for volume, folder in volumes.items():
            _disk(board, volume, folder)
        if gpu is not None:
            for name, value in gpu.figures().items():
                board.set(name, value)

    board.before_scrape(look)


def _memory(board: Registry) -> None:
    with suppress(OSError):
        for line in MEMORY_FILE.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in MEMORY:
                board.set(MEMORY[name], int(rest.split()[0]) * 1024)  # told in kB, which here are KiB


def _disk(board: Registry, volume: str, folder: Path) -> None:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with suppress(OSError):
        found = os.statvfs(there)
        board.set("mcl_disk_size_bytes", found.f_blocks * found.f_frsize, volume)
        board.set("mcl_disk_free_bytes", found.f_bavail * found.f_frsize, volume)

"""What a rank serves to Prometheus, put together: metrics, its machine, its web server, the file of all ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from launch.run.config import PretrainConfig
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import RankError, UserError
from mcl_dist.storage.folder import Folder
from monitoring.history.run_folder import RunFolder
from monitoring.http.file_sd import FILE, ScrapeTarget, write_targets
from monitoring.http.healthz import Healthz
from monitoring.http.server import Exporter, MonitoringConfig, reached_at
from monitoring.metrics.catalogue import Scope
from monitoring.metrics.gpu import Gpu, peak_flops
from monitoring.metrics.machine import watch_machine
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import TrainingMetrics
from monitoring.web.app import Page


@contextmanager
def exporting(config: PretrainConfig, group: ProcessGroup, device: torch.device) -> Iterator[TrainingMetrics]:
    """A listener whose metrics this rank serves within; `monitoring.port` must be set.

    Raises:
        UserError: the port is taken, or a file that the configuration names cannot be used.
    """
    settings, local_rank = config.monitoring, int(os.environ.get("LOCAL_RANK", "0"))
    board = Registry(_scopes(group, local_rank))
    pulse = Healthz(settings.stale_seconds)
    metrics = TrainingMetrics(board, pulse, _peak(settings, device, config.train.precision, group.size))
    board.set("mcl_run_info", 1, version("mcl-dist"), torch.__version__, config.train.precision, _name(device))
    watch_machine(board, _volumes(config), Gpu.of(device))
    with _serving(board, settings, local_rank, group) as exporter:
        exporter.mount("/healthz", pulse, is_open=True)
        host = reached_at(settings.address)
        rows = group.gather_texts(f"{socket.gethostname()} {host} {exporter.port}")
        targets = [ScrapeTarget(rank, *_place(row)) for rank, row in enumerate(rows)]
        file = Path(settings.targets or Path(config.run.dir) / FILE)
        run, tls = Path(config.run.dir).absolute().name, settings.tls_certificate is not None
        if group.is_first:
            write_targets(file, targets, run, tls=tls)
            exporter.mount("/", Page(RunFolder(Path(config.run.dir)).view))
        yield metrics
        if group.is_first:  # in order, finished or stopped; whatever fails leaves targets that do not answer
            write_targets(file, [], run, tls=tls)


@contextmanager
def _serving(board: Registry, settings: MonitoringConfig, local_rank: int, group: ProcessGroup) -> Iterator[Exporter]:
    registry = CollectorRegistry()
    registry.register(board)
    ProcessCollector(registry=registry)
    try:
        exporter = Exporter(registry, settings, offset=local_rank)
    except UserError as error:
        raise RankError(f"rank {group.rank}: {error}") from error
    try:
        yield exporter
    finally:
        exporter.close()


def _scopes(group: ProcessGroup, local_rank: int) -> list[Scope]:
    scopes: list[Scope] = ["rank"]
    scopes += ["run"] if group.is_first else []
    return scopes + (["node"] if local_rank == 0 else [])


def _volumes(config: PretrainConfig) -> dict[str, Path]:
    """Folders on disks of this machine that may fill up."""
    folders = {"run": config.run.dir, "cache": config.data.cache, "checkpoint": config.checkpoint.folder}
    local = {volume: Folder(folder) for volume, folder in folders.items() if folder is not None}
    return {volume: Path(folder.path("")) for volume, folder in local.items() if folder.is_local}


def _peak(settings: MonitoringConfig, device: torch.device, precision: str, num_ranks: int) -> float | None:
    """Of all ranks together."""
    known = peak_flops(_name(device), precision)
    one = known if settings.peak_tflops is None else settings.peak_tflops * 1e12
    return None if one is None else one * num_ranks


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _place(row: str) -> tuple[str, str, int]:
    node, host, port = row.split()
    return node, host, int(port)

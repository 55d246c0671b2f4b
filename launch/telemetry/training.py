"""The metrics server of a training rank, and the scrape targets of all ranks."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from launch.run.parts import errors_name_rank
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.storage.folder import Folder
from monitoring.history.run_folder import RunFolder
from monitoring.http.file_sd import TARGETS_FILE, ScrapeTarget, write_targets
from monitoring.http.healthz import Healthz
from monitoring.http.server import MetricsServer, MonitoringConfig, advertised_host
from monitoring.metrics.catalogue import Scope
from monitoring.metrics.gpu import Gpu, peak_flops
from monitoring.metrics.machine import register_machine_metrics
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import TrainingMetrics
from monitoring.web.app import RunApp


@contextmanager
def serve_training_metrics(
    config: MonitoringConfig, group: ProcessGroup, run_folder: Path, folders: Mapping[str, str | None], precision: str
) -> Iterator[TrainingMetrics]:
    """Serve this rank's metrics and `/healthz`, on the first rank also the run's page; yield the listener.

    All ranks must call this together. `config.port` must be set. `folders` are URLs by volume name, None for a volume
    that the run lacks; the disks of local ones are measured.

    Raises:
        UserError: the port is taken, or a file that the configuration names cannot be used.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    conditions: dict[Scope, bool] = {"rank": True, "run": group.is_first, "node": local_rank == 0}
    registry = Registry([scope for scope, is_served in conditions.items() if is_served])
    healthz = Healthz(config.stale_seconds)
    metrics = TrainingMetrics(registry, healthz, _peak_flops(config, group, precision))
    registry.set("mcl_run_info", 1, version("mcl-dist"), torch.__version__, precision, _device_name(group.device))
    register_machine_metrics(registry, _local_folders(folders), Gpu.for_device(group.device))
    with _open_server(registry, config, local_rank, group) as server:
        server.mount("/healthz", healthz, is_public=True)
        targets = _gather_targets(config, group, server.port)
        with _publish_targets(config, run_folder, targets) if group.is_first else nullcontext():
            if group.is_first:
                server.mount("/", RunApp(RunFolder(run_folder).view))
            yield metrics


@contextmanager
def _open_server(
    registry: Registry, config: MonitoringConfig, local_rank: int, group: ProcessGroup
) -> Iterator[MetricsServer]:
    collectors = CollectorRegistry()
    collectors.register(registry)
    ProcessCollector(registry=collectors)
    with errors_name_rank(group):
        server = MetricsServer(collectors, config, offset=local_rank)
    with closing(server):
        yield server


def _gather_targets(config: MonitoringConfig, group: ProcessGroup, port: int) -> list[ScrapeTarget]:
    """Where each rank serves its metrics; all ranks must call it together."""
    rows = group.gather_texts(f"{socket.gethostname()} {advertised_host(config.address)} {port}")
    places = (row.split() for row in rows)
    return [ScrapeTarget(rank, node, host, int(port)) for rank, (node, host, port) in enumerate(places)]


@contextmanager
def _publish_targets(config: MonitoringConfig, run_folder: Path, targets: list[ScrapeTarget]) -> Iterator[None]:
    """Write the targets file, and empty it at an orderly end; after an error it stays, which raises an alert."""
    file = Path(config.targets or run_folder / TARGETS_FILE)
    run, tls = run_folder.absolute().name, config.tls_certificate is not None
    write_targets(file, targets, run, tls=tls)
    yield
    write_targets(file, [], run, tls=tls)


def _local_folders(folders: Mapping[str, str | None]) -> dict[str, Path]:
    opened = {volume: Folder(folder) for volume, folder in folders.items() if folder is not None}
    return {volume: Path(folder.path("")) for volume, folder in opened.items() if folder.is_local}


def _peak_flops(config: MonitoringConfig, group: ProcessGroup, precision: str) -> float | None:
    """Peak FLOPs per second of all ranks' devices together; None if not configured and not known."""
    known = peak_flops(_device_name(group.device), precision)
    per_device = known if config.peak_tflops is None else config.peak_tflops * 1e12
    return None if per_device is None else per_device * group.size


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

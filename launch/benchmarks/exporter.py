"""Cost of exporting metrics per training step: the listener that updates them, and the scrapes."""

from __future__ import annotations

import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

from launch.benchmarks.step import WARM_UP, run_in_process
from launch.benchmarks.step_variants import TrainerStep, noise, step_variants
from launch.run.config import PretrainConfig
from launch.telemetry.batch_job_metrics import serve_or_push
from mcl_dist.events import Event, Listener, LoaderReport
from mcl_dist.training.deepspeed_engine import pick_device
from monitoring.http.healthz import Healthz
from monitoring.metrics.gpu import Gpu
from monitoring.metrics.machine import register_machine_metrics
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import TrainingMetrics

SCRAPE_SECONDS = 15.0  # between two scrapes, as in monitoring/prometheus/prometheus.yml
SCRAPE_SPEEDUP = 10  # more frequent scrapes while wall times are compared, so that the steps include some
SCRAPES = 50  # for the CPU time of one
Z_95 = 1.96  # standard errors on either side of a 95 % confidence interval
REPORT = LoaderReport(
    expected=4, delivered=4, replaced=0, bad_samples={"checksum": 1}, waited_seconds=0.1, queue=2,
    stages={"decode": 0.1, "augment": 0.1}, storage={"bytes_read": 4, "requests": 4, "retries": {"reset": 1}},
    worker_cpu_seconds=0.1, worker_peak_bytes=4,
)  # fmt: skip


@dataclass(frozen=True)
class ExporterResult:
    """Cost of exporting for the first rank of a run, which exports most.

    Attributes:
        overhead: CPU time of listener and scrapes as a share of a step's CPU time, all in this process.
        listener_us: CPU time of the listener per step, with one loader report per step; runs have fewer.
        scrape_ms: CPU time of answering one scrape; there is one every `SCRAPE_SECONDS`.
        step_cpu_ms: CPU time of the step that used least; on a busy machine, waiting threads use more.
        step_ms: median wall time of a step.
        wall_ratio: wall time of exported steps over that of alternating steps without export, with
            `SCRAPE_SPEEDUP` times as many scrapes.
        wall_spread: half width of the 95 % confidence interval of `wall_ratio`.
    """

    overhead: float
    listener_us: float
    scrape_ms: float
    step_cpu_ms: float
    step_ms: float
    wall_ratio: float
    wall_spread: float


def measure_exporter(config: PretrainConfig, steps: int) -> ExporterResult:
    """Take `steps` steps each with and without export in turn, on noise, then answer scrapes only.

    The global batch is on one device of one new process; raises as `run_in_process`.
    """
    return run_in_process(_measure, config, steps)


def _measure(config: PretrainConfig, steps: int) -> ExporterResult:
    device = pick_device()
    registry = Registry(["run", "rank", "node"])
    register_machine_metrics(registry, {"run": Path(tempfile.gettempdir())}, Gpu.for_device(device))
    exported = _Timed(TrainingMetrics(registry, Healthz(600.0), peak_flops=1e12))
    listeners: list[Listener] = []
    step, batch = TrainerStep(config, step_variants(config, device)[-1], device, listeners), noise(config, device)
    run_step = partial(step, batch, lambda _: None)
    for _ in range(WARM_UP):
        run_step()
    plain, with_export, cpu, unscraped = [], [], [], 0.0
    with serve_or_push(registry, 0) as port, _Scraper(f"http://127.0.0.1:{port}/metrics") as scraper:
        for _ in range(steps):
            started = time.process_time()
            plain.append(_seconds(run_step))
            cpu.append(time.process_time() - started)
            listeners.append(exported)
            with scraper.scraping() if unscraped * SCRAPE_SPEEDUP >= SCRAPE_SECONDS else nullcontext():
                with_export.append(_seconds(run_step))
            listeners.clear()
            unscraped = with_export[-1] + (unscraped if unscraped * SCRAPE_SPEEDUP < SCRAPE_SECONDS else 0.0)
        scrape = scraper.cpu_seconds()
    listener, seconds = exported.seconds / steps, median(plain)
    differences = [with_it - without for with_it, without in zip(with_export, plain, strict=True)]
    return ExporterResult(
        overhead=(listener + scrape * seconds / SCRAPE_SECONDS) / min(cpu),
        listener_us=listener * 1e6,
        scrape_ms=scrape * 1e3,
        step_cpu_ms=min(cpu) * 1e3,
        step_ms=seconds * 1e3,
        wall_ratio=mean(with_export) / mean(plain),
        wall_spread=Z_95 * stdev(differences) / sqrt(steps) / mean(plain),
    )


class _Scraper:
    """Scrapes metrics like Prometheus, from another process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> _Scraper:
        self._process.submit(_scrape, self._url, 1).result()  # starts the process
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    @contextmanager
    def scraping(self) -> Iterator[None]:
        """Scrape while the block runs; the scrape begins first."""
        scrape = self._process.submit(_scrape, self._url, 1)
        yield
        scrape.result()

    def cpu_seconds(self) -> float:
        """CPU seconds of this process per scrape while it does nothing else."""
        started = time.process_time()
        self._process.submit(_scrape, self._url, SCRAPES).result()
        return (time.process_time() - started) / SCRAPES


class _Timed:
    """A listener that adds up the CPU seconds of another one, and passes it a loader report with every event."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        started = time.thread_time()
        self._listener(event)
        self._listener(REPORT)
        self.seconds += time.thread_time() - started


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _scrape(url: str, times: int) -> None:
    for _ in range(times):
        with urllib.request.urlopen(url, timeout=30) as response:
            response.read()

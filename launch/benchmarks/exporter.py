"""What exporting costs a training step: the listener that keeps the metrics, and the scrapes."""

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

from launch.benchmarks.step import WARM_UP, in_a_process
from launch.benchmarks.step_forms import TrainerStep, forms, noise
from launch.run.config import PretrainConfig
from launch.telemetry.batch_job_metrics import showing
from mcl_dist.events import Event, Listener, LoaderReport
from mcl_dist.training.deepspeed_engine import pick_device
from monitoring.http.healthz import Healthz
from monitoring.metrics.gpu import Gpu
from monitoring.metrics.machine import watch_machine
from monitoring.metrics.registry import Registry
from monitoring.metrics.training_metrics import TrainingMetrics

SCRAPE_SECONDS = 15.0  # between two scrapes, as in monitoring/prometheus/prometheus.yml
HASTE = 10  # times as often it is scraped while wall times are compared, for there to be some in the time
SCRAPES = 50  # measured
IN_95 = 1.96  # standard errors on either side hold 95 %
REPORT = LoaderReport(
    expected=4, delivered=4, replaced=0, bad_samples={"checksum": 1}, waited_seconds=0.1, queue=2,
    stages={"decode": 0.1, "augment": 0.1}, storage={"bytes_read": 4, "requests": 4, "retries": {"reset": 1}},
    worker_cpu_seconds=0.1, worker_peak_bytes=4,
)  # fmt: skip


@dataclass(frozen=True)
class ExporterResult:
    """What exporting costs the first rank of a run, which exports most.

    Attributes:
        overhead: share of a step's CPU time that listener and scrapes take together, both counted in this process.
        listener_us: CPU time of the listener in a step, a report of the loader included, of which runs tell fewer.
        scrape_ms: CPU time of answering a scrape; there is one every `SCRAPE_SECONDS`.
        step_cpu_ms: CPU time of the step that took least: threads that wait for a core on a busy machine take more.
        step_ms: wall time of a step, median.
        wall_ratio: wall time of steps that are exported over that of steps in turn with them that are not, with
            `HASTE` times as many scrapes; 95 % of such ratios lie within `wall_spread` of the true one.
    """

    overhead: float
    listener_us: float
    scrape_ms: float
    step_cpu_ms: float
    step_ms: float
    wall_ratio: float
    wall_spread: float


def benchmark(config: PretrainConfig, steps: int) -> ExporterResult:
    """Take steps on noise in one process, every other one exported, then answer scrapes alone.

    Args:
        config: of the steps; the global batch is on one device.
        steps: of each kind.

    Raises:
        UserError: when the process dies, which is mostly for want of memory.
    """
    return in_a_process(_measure, config, steps)


def _measure(config: PretrainConfig, steps: int) -> ExporterResult:
    device = pick_device()
    board = Registry(["run", "rank", "node"])
    watch_machine(board, {"run": Path(tempfile.gettempdir())}, Gpu.of(device))
    exported = _Timed(TrainingMetrics(board, Healthz(600.0), peak_flops=1e12))
    listeners: list[Listener] = []
    step, batch = TrainerStep(config, forms(config, device)[-1], device, listeners), noise(config, device)
    take = partial(step, batch, lambda _: None)
    for _ in range(WARM_UP):
        take()
    plain, beside, cpu, unscraped = [], [], [], 0.0
    with showing(board, 0) as port, _Scraper(f"http://127.0.0.1:{port}/metrics") as scraper:
        for _ in range(steps):
            started = time.process_time()
            plain.append(_seconds(take))
            cpu.append(time.process_time() - started)
            listeners.append(exported)
            with scraper.scraping() if unscraped * HASTE >= SCRAPE_SECONDS else nullcontext():
                beside.append(_seconds(take))
            listeners.clear()
            unscraped = beside[-1] + (unscraped if unscraped * HASTE < SCRAPE_SECONDS else 0.0)
        scrape = scraper.cpu_seconds()
    listener, seconds = exported.seconds / steps, median(plain)
    differences = [with_it - without for with_it, without in zip(beside, plain, strict=True)]
    return ExporterResult(
        overhead=(listener + scrape * seconds / SCRAPE_SECONDS) / min(cpu),
        listener_us=listener * 1e6,
        scrape_ms=scrape * 1e3,
        step_cpu_ms=min(cpu) * 1e3,
        step_ms=seconds * 1e3,
        wall_ratio=mean(beside) / mean(plain),
        wall_spread=IN_95 * stdev(differences) / sqrt(steps) / mean(plain),
    )


class _Scraper:
    """Asks for metrics as Prometheus does, from another process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> _Scraper:
        self._process.submit(_scrape, self._url, 1).result()  # which starts the process
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    @contextmanager
    def scraping(self) -> Iterator[None]:
        """A scrape begins before what is done within."""
        scrape = self._process.submit(_scrape, self._url, 1)
        yield
        scrape.result()

    def cpu_seconds(self) -> float:
        """Of this process, for a scrape that it answers while it does nothing else."""
        started = time.process_time()
        self._process.submit(_scrape, self._url, SCRAPES).result()
        return (time.process_time() - started) / SCRAPES


class _Timed:
    """A listener, and the CPU seconds that it has taken; it also hears of the loader with every step."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.seconds = 0.0

    def __call__(self, event: Event) -> None:
        """Pass the event on."""
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
        with urllib.request.urlopen(url, timeout=30) as answer:
            answer.read()

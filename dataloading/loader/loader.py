"""From shard sets to batches: order, read, draw, decode, augment, target; in this process or in workers."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from dataloading.loader.bad_sample_log import BadSampleLog
from dataloading.loader.batch_maker import BatchMaker
from dataloading.loader.config import DataConfig, LabelledConfig, check_blur, check_clips
from dataloading.loader.cuda_stream import on_side_stream, wait_for_batch
from dataloading.loader.prefetch import Prefetcher
from dataloading.loader.step_jobs import (
    THIS_PROCESS,
    BatchWorker,
    DecodedStep,
    EncodedStep,
    LoaderShard,
    ReadWorker,
    StepReader,
    UsageByProcess,
    decode_step,
)
from dataloading.loader.video_source import bad_sample_budget_error, sum_counts
from dataloading.loader.worker_pool import WorkerPool
from mcl_dist.batch import Batch, LabelledBatch, TubeletBatch
from mcl_dist.events import LoaderReport

REPORT_SECONDS = 20.0  # a rate over a minute, the shortest window of the dashboards, always has two reports

Delivered = TypeVar("Delivered", bound=Batch)


class Loader(Generic[Delivered]):
    """One rank's batches from `start_step` on, to the end of `epochs` epochs or without end; prefetched.

    The global batch of a step depends only on (seed, step, global_batch), the configured lanes, shuffle_window,
    min_windows, frames and stride, and the sets with their weights.
    A bad sample is replaced by the next one of its lane and logged in the file `bad_samples`. `listen` receives a
    report every 20 seconds, and at the end.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        num_left_out: videos of the sets that are too short.
        num_steps: end of the batches, counted from the first step of the first epoch; None without end.

    Raises:
        UserError: a set cannot be read, or has too few usable videos; while iterating also: storage fails, a worker
            dies, or more samples are bad than the budget allows.
        ConfigError: the ranks do not divide the lanes, the lanes not the global batch, the grid of the targets does
            not divide a clip, the blur is wider than a view, or a set does not store the frames that the stride needs.
    """

    def __init__(
        self,
        config: DataConfig | LabelledConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        grid: tuple[int, int, int] | None,
        device: torch.device,
        start_step: int = 0,
        epochs: int | None = None,
        bad_samples: Path | None = None,
        listen: Callable[[LoaderReport], None] | None = None,
    ) -> None:
        if isinstance(config, LabelledConfig):
            check_blur(config)
        elif grid is not None:
            check_clips(config, grid)
        self._config = config
        shard = LoaderShard(seed, global_batch, rank, num_ranks, grid)
        self._source = shard.source(config)
        self.steps_per_epoch = self._source.steps_per_epoch
        self.num_left_out = self._source.num_left_out
        self.num_steps = None if epochs is None else epochs * self.steps_per_epoch
        self._bad_samples = BadSampleLog(bad_samples)
        self._listen = listen
        self._last_report = time.monotonic()
        self._usage: UsageByProcess = {}
        self._per_step = global_batch // num_ranks
        self._expected = self._delivered = self._replaced = 0
        self._waited = 0.0
        self._pool: WorkerPool | None = None
        self._maker: BatchMaker | None = None
        steps = itertools.count(start_step) if self.num_steps is None else range(start_step, self.num_steps)
        self._prefetcher = Prefetcher(
            self._decoded_on_device(shard, steps, device),
            depth=config.prefetch,
            name="loader",
            while_waiting=self._emit_report,  # failing requests are reported although no batch arrives
            interval=REPORT_SECONDS,
        )

    def __iter__(self) -> Iterator[Delivered]:
        steps = iter(self._prefetcher)
        while True:
            start = time.perf_counter()
            decoded = next(steps, None)
            self._waited += time.perf_counter() - start
            if decoded is None:
                return
            self._count(wait_for_batch(decoded))
            if time.monotonic() - self._last_report > REPORT_SECONDS:
                self._emit_report()
            yield cast(Delivered, decoded.batch)

    def report(self) -> LoaderReport:
        """All counts so far, including the workers'."""
        total: dict[str, Any] = {}
        usage = self._usage
        if self._pool is None:  # this process knows its reads at any time; those of workers arrive with their batches
            usage = {THIS_PROCESS: {**usage.get(THIS_PROCESS, {}), "storage": self._source.counters()}}
        for each in usage.values():
            total = sum_counts(total, each)
        return LoaderReport(
            expected=self._expected,
            delivered=self._delivered,
            replaced=self._replaced,
            bad_samples=dict(self._bad_samples.by_reason),
            waited_seconds=self._waited,
            queue=len(self._prefetcher),
            stages=total.get("stages", {}),
            storage=total.get("storage", {}),
            worker_cpu_seconds=total.get("worker_cpu_seconds", 0.0),
            worker_peak_bytes=total.get("worker_peak_bytes", 0),
        )

    def name_of(self, position: int) -> str:
        """Name in messages of the video at a position of `Batch.samples`."""
        return self._source.name_of(position)

    def close(self) -> None:
        """Stop threads, workers and decoders; no more batches."""
        if self._pool is not None:
            self._pool.close()
        self._prefetcher.close()
        self._source.close()
        if self._maker is not None:
            self._maker.close()
        self._emit_report()

    def _decoded_on_device(
        self, shard: LoaderShard, steps: Iterable[int], device: torch.device
    ) -> Iterable[DecodedStep]:
        """Steps with their batches on the device, decoded there or copied to it; on a GPU in a side stream."""
        decoder_device = self._config.decoder_device(device)
        decoded = self._decoded(shard, steps, decoder_device)
        if decoder_device != device:
            decoded = (replace(each, batch=each.batch.to(device)) for each in decoded)
        return on_side_stream(decoded, device) if device.type == "cuda" else decoded

    def _decoded(self, shard: LoaderShard, steps: Iterable[int], device: torch.device) -> Iterable[DecodedStep]:
        """Read and draw each step, then decode it, each in the workers or in this process."""
        config, num_workers = self._config, self._config.workers
        if num_workers and device.type == "cpu":
            self._pool = WorkerPool(BatchWorker(config, shard), num_workers, steps)
            return map(BatchWorker.from_result, self._pool)
        maker = self._maker = BatchMaker(config, shard.grid, device)
        encoded: Iterable[EncodedStep] = map(StepReader(self._source), steps)
        if num_workers:
            self._pool = WorkerPool(ReadWorker(config, shard), num_workers, steps)
            encoded = map(ReadWorker.from_result, self._pool)
        return (decode_step(each, maker, self._source) for each in encoded)

    def _count(self, decoded: DecodedStep) -> None:
        """Count a batch; raise when its bad samples exceed the budget."""
        self._expected += self._per_step
        self._delivered += len(decoded.batch.samples) - decoded.replaced
        self._replaced += decoded.replaced
        self._usage |= decoded.usage
        for record in decoded.bad:
            self._bad_samples.add(decoded.step, record)
            if self._bad_samples.num_samples > self._source.bad_allowed:
                raise bad_sample_budget_error(
                    self._config.max_bad_fraction, self._source.num_samples, record["message"]
                )

    def _emit_report(self) -> None:
        self._last_report = time.monotonic()
        if self._listen is not None:
            self._listen(self.report())


class TubeletLoader(Loader[TubeletBatch]):
    """Tubelets for pre-training: with a `DataConfig`, and with motion targets on a grid."""


class LabelledLoader(Loader[LabelledBatch]):
    """Clips with their classes, for training a classifier: with a `LabelledConfig` and `grid=None`."""

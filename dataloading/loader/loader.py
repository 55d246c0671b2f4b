"""From shard sets to batches: plan, read, draw, decode, augment, target, here or in workers."""

from __future__ import annotations

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
from dataloading.loader.cuda_stream import arrived, beside_training
from dataloading.loader.prefetch import Prefetcher
from dataloading.loader.step_jobs import (
    HERE,
    BatchWorker,
    DecodedStep,
    EncodedStep,
    LoaderShard,
    ReadWorker,
    Spent,
    StepReader,
    decode_step,
)
from dataloading.loader.video_source import added, too_many_bad
from dataloading.loader.worker_pool import WorkerPool
from mcl_dist.batch import Batch, LabelledBatch, TubeletBatch
from mcl_dist.events import LoaderReport

REPORT_SECONDS = 20.0  # a rate over a minute, the shortest that dashboards look at, always sees two

Delivered = TypeVar("Delivered", bound=Batch)


class Loader(Generic[Delivered]):
    """One rank's batches from `start_step` on, to the end of `epochs` epochs or without end; made ahead.

    What the global batch of a step holds depends on (seed, step, global_batch), the configured lanes, shuffle_window,
    min_windows, frames and stride, and the sets with their weights alone.
    A bad sample is replaced by the next of its lane; the list of them is kept in the file `bad_samples`. `listen`
    hears of it all every 20 seconds, and at the end.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        num_left_out: videos of the sets that are too short.
        num_steps: up to which batches come, counted from the first epoch's first; None without end.

    Raises:
        UserError: a set cannot be read, or has too few usable videos; while iterating also when storage fails,
            a worker dies, or there are more bad samples than may be.
        ConfigError: ranks do not divide the lanes, lanes not the global batch, the grid of the targets does not
            divide a clip, the blur is wider than a view, or a set does not store the frames that the stride asks
            for.
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
        share = LoaderShard(seed, global_batch, rank, num_ranks, grid)
        self._source = share.source(config)
        self.steps_per_epoch = self._source.steps_per_epoch
        self.num_left_out = self._source.num_left_out
        self.num_steps = None if epochs is None else epochs * self.steps_per_epoch
        self._bad = BadSampleLog(bad_samples)
        self._listen = listen
        self._last_told = time.monotonic()
        self._spent: Spent = {}
        self._per_step = global_batch // num_ranks
        self._expected = self._delivered = self._replaced = 0
        self._waited = 0.0
        self._crew: WorkerPool | None = None
        self._maker: BatchMaker | None = None
        steps = itertools.count(start_step) if self.num_steps is None else range(start_step, self.num_steps)
        self._ahead = Prefetcher(
            self._chain(share, steps, device),
            depth=config.prefetch,
            name="loader",
            meanwhile=self._tell,  # of requests that fail, while no batch can come for them
            seconds=REPORT_SECONDS,
        )

    def __iter__(self) -> Iterator[Delivered]:
        ahead = iter(self._ahead)
        while True:
            start = time.perf_counter()
            made = next(ahead, None)
            self._waited += time.perf_counter() - start
            if made is None:
                return
            self._take_in(arrived(made))
            if time.monotonic() - self._last_told > REPORT_SECONDS:
                self._tell()
            yield cast(Delivered, made.batch)

    def report(self) -> LoaderReport:
        """What has been done so far, workers included."""
        total: dict[str, Any] = {}
        spent = self._spent
        if self._crew is None:  # what this process reads is known at any time, what workers read with their batches
            spent = {HERE: {**spent.get(HERE, {}), "storage": self._source.counters()}}
        for each in spent.values():
            total = added(total, each)
        return LoaderReport(
            expected=self._expected,
            delivered=self._delivered,
            replaced=self._replaced,
            bad_samples=dict(self._bad.by_reason),
            waited_seconds=self._waited,
            queue=len(self._ahead),
            stages=total.get("stages", {}),
            storage=total.get("storage", {}),
            worker_cpu_seconds=total.get("worker_cpu_seconds", 0.0),
            worker_peak_bytes=total.get("worker_peak_bytes", 0),
        )

    def name_of(self, position: int) -> str:
        """What messages call the video at a position of `Batch.samples`."""
        return self._source.name_of(position)

    def close(self) -> None:
        """End threads, workers and decoders; the batches are over."""
        if self._crew is not None:
            self._crew.close()
        self._ahead.close()
        self._source.close()
        if self._maker is not None:
            self._maker.close()
        self._tell()

    def _chain(self, share: LoaderShard, steps: Iterable[int], device: torch.device) -> Iterable[DecodedStep]:
        """Batches on the device, made there or copied to it; on a GPU in a stream of its own."""
        where = self._config.decoder_device(device)
        made = self._made(share, steps, where)
        if where != device:
            made = (replace(each, batch=each.batch.to(device)) for each in made)
        return beside_training(made, device) if device.type == "cuda" else made

    def _made(self, share: LoaderShard, steps: Iterable[int], device: torch.device) -> Iterable[DecodedStep]:
        """From steps to batches: read and drawn, then decoded, each in the workers or here."""
        config, num_workers = self._config, self._config.workers
        if num_workers and device.type == "cpu":
            self._crew = WorkerPool(BatchWorker(config, share), num_workers, steps)
            return map(BatchWorker.received, self._crew)
        maker = self._maker = BatchMaker(config, share.grid, device)
        read: Iterable[EncodedStep] = map(StepReader(self._source), steps)
        if num_workers:
            self._crew = WorkerPool(ReadWorker(config, share), num_workers, steps)
            read = map(ReadWorker.received, self._crew)
        return (decode_step(each, maker, self._source) for each in read)

    def _take_in(self, made: DecodedStep) -> None:
        """Count a batch, and hold its bad samples against the budget."""
        self._expected += self._per_step
        self._delivered += len(made.batch.samples) - made.replaced
        self._replaced += made.replaced
        self._spent |= made.spent
        for found in made.bad:
            self._bad.add(made.step, found)
            if self._bad.num_samples > self._source.bad_allowed:
                raise too_many_bad(self._config.max_bad_fraction, self._source.num_samples, found["message"])

    def _tell(self) -> None:
        self._last_told = time.monotonic()
        if self._listen is not None:
            self._listen(self.report())


class TubeletLoader(Loader[TubeletBatch]):
    """Tubelets to pre-train on: of a `DataConfig`, with motion targets on a grid."""


class LabelledLoader(Loader[LabelledBatch]):
    """Clips with their classes, to train a classifier on: of a `LabelledConfig`, with `grid=None`."""

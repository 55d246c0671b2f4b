"""One step of a rank: read and drawn, then decoded, in this process or in a worker."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dataloading.loader.bad_sample_log import bad_sample_record
from dataloading.loader.batch_maker import BatchMaker
from dataloading.loader.config import DataConfig, LabelledConfig
from dataloading.loader.serialization import pack, unpack
from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.stage_timer import StageTimer
from dataloading.loader.video_source import EncodedVideo, VideoSource
from dataloading.loader.worker_pool import StepFunction, StepResult
from mcl_dist.batch import Batch, LabelledBatch, TubeletBatch

THIS_PROCESS = -1  # key of this process in `UsageByProcess`; workers have their numbers
# What each process has used so far: counts, and trees of counts.
UsageByProcess = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class LoaderShard:
    """The part of a run that one rank loads; with the step it determines a batch. `grid` as in `BatchMaker`."""

    seed: int
    global_batch: int
    rank: int
    num_ranks: int
    grid: tuple[int, int, int] | None

    def source(self, config: DataConfig | LabelledConfig) -> VideoSource:
        """The videos of this rank."""
        return VideoSource(
            config, seed=self.seed, global_batch=self.global_batch, rank=self.rank, num_ranks=self.num_ranks
        )


@dataclass(frozen=True)
class EncodedStep:
    """A step's videos before decoding, and a `bad_sample_record` for each bad sample met."""

    step: int
    videos: list[EncodedVideo]
    bad: list[dict[str, Any]]
    usage: UsageByProcess


@dataclass(frozen=True)
class DecodedStep:
    """A step's batch, its number of replacements, and a `bad_sample_record` for each bad sample met.

    Attributes:
        ready: event after the GPU work for the batch; None if the batch was complete when it was handed over.
    """

    step: int
    batch: Batch
    replaced: int
    bad: list[dict[str, Any]]
    usage: UsageByProcess
    ready: torch.cuda.Event | None = None


class StepReader:
    """Reads and draws in this process."""

    def __init__(self, source: VideoSource) -> None:
        self._source = source
        self._timer = StageTimer()

    def __call__(self, step: int) -> EncodedStep:
        """The videos of a step; errors as `VideoSource.videos`."""
        with self._timer("draw and read"):
            videos, bad = self._source.videos(step)
        usage = {"stages": dict(self._timer.seconds), "storage": self._source.counters()}
        return EncodedStep(step, videos, [bad_sample_record(error) for error in bad], {THIS_PROCESS: usage})


def decode_step(
    encoded: EncodedStep,
    maker: BatchMaker,
    source: VideoSource,
    allocate_views: Callable[[int], torch.Tensor] | None = None,
) -> DecodedStep:
    """Decode a step in this process; `allocate_views` gives the memory for the views of a number of videos."""
    views = allocate_views(len(encoded.videos)) if allocate_views else None
    batch, videos, bad = maker.batch(encoded.videos, source.replacement, views)
    usage = encoded.usage.get(THIS_PROCESS, {})
    usage = {**usage, "stages": {**usage.get("stages", {}), **maker.timer.seconds}}
    return DecodedStep(
        encoded.step,
        batch,
        replaced=sum(video.attempt > 0 for video in videos),
        bad=encoded.bad + [bad_sample_record(error) for error in bad],
        usage={**encoded.usage, THIS_PROCESS: usage},
    )


@dataclass(frozen=True)
class ReadWorker:
    """Starts a worker that reads and draws, for a process that decodes on a GPU."""

    config: DataConfig | LabelledConfig
    shard: LoaderShard

    def __call__(self) -> StepFunction:
        """The function that puts a step's encoded videos into a buffer."""
        reader = StepReader(self.shard.source(self.config))
        started = time.process_time()

        def read_step(step: int, buffer: SharedArrays) -> dict[str, Any]:
            encoded = reader(step)
            return {
                "step": step,
                "videos": pack(encoded.videos, buffer),
                "bad": encoded.bad,
                "usage": _worker_usage(encoded.usage, started),
            }

        return read_step

    @staticmethod
    def from_result(result: StepResult) -> EncodedStep:
        """The step that a worker has read."""
        report = result.report
        videos = unpack(report["videos"], result.arrays)
        return EncodedStep(report["step"], videos, report["bad"], {result.worker: report["usage"]})


@dataclass(frozen=True)
class BatchWorker:
    """Starts a worker that makes whole batches on the CPU."""

    config: DataConfig | LabelledConfig
    shard: LoaderShard

    def __call__(self) -> StepFunction:
        """The function that puts the tensors of a step's batch into a buffer."""
        torch.set_num_threads(1)
        source = self.shard.source(self.config)
        reader, maker = StepReader(source), BatchMaker(self.config, self.shard.grid, torch.device("cpu"))
        started = time.process_time()

        def make_batch(step: int, buffer: SharedArrays) -> dict[str, Any]:
            def allocate_views(num_videos: int) -> torch.Tensor:
                return torch.from_numpy(buffer.allocate("views", maker.views_shape(num_videos), "uint8"))

            decoded = decode_step(reader(step), maker, source, allocate_views)
            for name, tensor in vars(decoded.batch).items():
                if name != "views":
                    buffer.put(name, tensor.numpy())
            usage = _worker_usage(decoded.usage, started)
            return {"step": step, "replaced": decoded.replaced, "bad": decoded.bad, "usage": usage}

        return make_batch

    @staticmethod
    def from_result(result: StepResult) -> DecodedStep:
        """The step whose batch a worker has made; the worker reuses its memory once the batch is freed."""
        report = result.report
        kind = LabelledBatch if "labels" in result.arrays else TubeletBatch
        batch = kind(**{name: torch.from_numpy(values) for name, values in result.arrays.items()})
        return DecodedStep(report["step"], batch, report["replaced"], report["bad"], {result.worker: report["usage"]})


def _worker_usage(usage: UsageByProcess, started: float) -> dict[str, Any]:
    """This worker's usage, with its CPU seconds since `started` and its peak memory."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # ru_maxrss is in KiB
    return {**usage[THIS_PROCESS], "worker_cpu_seconds": time.process_time() - started, "worker_peak_bytes": peak_bytes}

"""One step of a rank: read and drawn, then decoded, here or in a worker."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dataloading.loader.bad_sample_log import described
from dataloading.loader.batch_maker import BatchMaker
from dataloading.loader.config import DataConfig, LabelledConfig
from dataloading.loader.serialization import pack, unpack
from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.stage_timer import StageTimer
from dataloading.loader.video_source import EncodedVideo, VideoSource
from dataloading.loader.worker_pool import Done, DoStep
from mcl_dist.batch import Batch, LabelledBatch, TubeletBatch

HERE = -1  # stands for this process where workers have their numbers
# What processes have taken so far, by their number: counts, and trees of counts.
Spent = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class LoaderShard:
    """Which part of which run: what with the step decides what a batch holds; `grid` as of `BatchMaker`."""

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
    """A step's videos before decoding, and the bad samples met (`described`)."""

    step: int
    videos: list[EncodedVideo]
    bad: list[dict[str, Any]]
    spent: Spent


@dataclass(frozen=True)
class DecodedStep:
    """A step's batch, how many of its videos stand in for others, and the bad samples met (`described`).

    Attributes:
        ready: when a GPU has made the batch; None where it was made before it was handed over.
    """

    step: int
    batch: Batch
    replaced: int
    bad: list[dict[str, Any]]
    spent: Spent
    ready: torch.cuda.Event | None = None


class StepReader:
    """Reads and draws in this process."""

    def __init__(self, source: VideoSource) -> None:
        self._source = source
        self._clock = StageTimer()

    def __call__(self, step: int) -> EncodedStep:
        """The videos of a step; errors as `VideoSource.videos`."""
        with self._clock("draw and read"):
            videos, bad = self._source.videos(step)
        taken = {"stages": dict(self._clock.seconds), "storage": self._source.counters()}
        return EncodedStep(step, videos, [described(error) for error in bad], {HERE: taken})


def decode_step(
    read: EncodedStep,
    maker: BatchMaker,
    source: VideoSource,
    room_for_views: Callable[[int], torch.Tensor] | None = None,
) -> DecodedStep:
    """The batch of what was read, in this process; `room_for_views` gives memory for so many videos' views."""
    views = room_for_views(len(read.videos)) if room_for_views else None
    batch, videos, bad = maker.batch(read.videos, source.stand_in, views)
    taken = read.spent.get(HERE, {})
    here = {**taken, "stages": {**taken.get("stages", {}), **maker.stages.seconds}}
    replaced = sum(video.attempt > 0 for video in videos)
    return DecodedStep(
        read.step, batch, replaced, read.bad + [described(error) for error in bad], {**read.spent, HERE: here}
    )


@dataclass(frozen=True)
class ReadWorker:
    """Starts a worker that reads and draws, for a process with a GPU to decode."""

    config: DataConfig | LabelledConfig
    share: LoaderShard

    def __call__(self) -> DoStep:
        """What puts the encoded videos of a step into a room."""
        reader = StepReader(self.share.source(self.config))
        started = time.process_time()

        def do_step(step: int, room: SharedArrays) -> dict[str, Any]:
            read = reader(step)
            return {
                "step": step,
                "videos": pack(read.videos, room),
                "bad": read.bad,
                "spent": _of_worker(read.spent, started),
            }

        return do_step

    @staticmethod
    def received(done: Done) -> EncodedStep:
        """What the worker has read."""
        said = done.report
        videos = unpack(said["videos"], done.arrays)
        return EncodedStep(said["step"], videos, said["bad"], {done.worker: said["spent"]})


@dataclass(frozen=True)
class BatchWorker:
    """Starts a worker that makes whole batches on the CPU."""

    config: DataConfig | LabelledConfig
    share: LoaderShard

    def __call__(self) -> DoStep:
        """What puts the tensors of a step's batch into a room."""
        torch.set_num_threads(1)
        source = self.share.source(self.config)
        reader, maker = StepReader(source), BatchMaker(self.config, self.share.grid, torch.device("cpu"))
        started = time.process_time()

        def do_step(step: int, room: SharedArrays) -> dict[str, Any]:
            def views(num_videos: int) -> torch.Tensor:
                return torch.from_numpy(room.array("views", maker.views_shape(num_videos), "uint8"))

            made = decode_step(reader(step), maker, source, views)
            for name, tensor in vars(made.batch).items():
                if name != "views":
                    room.put(name, tensor.numpy())
            return {"step": step, "replaced": made.replaced, "bad": made.bad, "spent": _of_worker(made.spent, started)}

        return do_step

    @staticmethod
    def received(done: Done) -> DecodedStep:
        """What the worker has made; its memory is the worker's again when the batch is gone."""
        said = done.report
        kind = LabelledBatch if "labels" in done.arrays else TubeletBatch
        batch = kind(**{name: torch.from_numpy(values) for name, values in done.arrays.items()})
        return DecodedStep(said["step"], batch, said["replaced"], said["bad"], {done.worker: said["spent"]})


def _of_worker(spent: Spent, started: float) -> dict[str, Any]:
    """With what only a process of its own can say: the CPU time since it `started`, and its memory."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # told in KiB
    return {**spent[HERE], "worker_cpu_seconds": time.process_time() - started, "worker_peak_bytes": peak_bytes}

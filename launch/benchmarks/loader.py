"""Throughput of the loader, its CPU time by stage, and a digest of its batches."""

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dataloading.loader.loader import TubeletLoader
from dataloading.loader.step_jobs import LoaderShard
from launch.run.config import PretrainConfig
from mcl_dist.batch import TubeletBatch
from mcl_dist.config import load_config
from mcl_dist.events import LoaderReport

LARGEST_BATCH = 32


@dataclass
class _Totals:
    """Totals over all ranks; times exclude each rank's first batch if it has more than one."""

    videos: int = 0
    measured: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    bytes_read: int = 0
    bytes_decoded: int = 0
    replaced: int = 0
    unaccounted: int = 0
    worker_peak: int = 0
    first_batch_seconds: float = 0.0
    stage_seconds: Counter[str] = field(default_factory=Counter)
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)


def loader_benchmark_config(url: str, path: str | None, overrides: Sequence[str], cache: str) -> PretrainConfig:
    """A run's configuration for the shard set at `url`, cached in the folder `cache` unless the overrides name another.

    Without a configuration file, the global batch is the largest power of two that does not exceed the number of
    videos that are long enough or 32, so that it can be divided among 1, 2 or 4 ranks.

    Raises:
        UserError: the set cannot be read.
        ConfigError: an unknown key or a value out of range.
    """
    settings = [f"data.train={json.dumps(url)}", "run.dir=none", f"data.cache={json.dumps(cache)}", *overrides]
    config = load_config(PretrainConfig, path, settings)
    if path is not None or any(override.startswith("train.global_batch=") for override in overrides):
        return config
    shard = LoaderShard(config.run.seed, global_batch=1, rank=0, num_ranks=1, grid=(1, 1, 1))
    with closing(shard.source(config.data)) as source:
        batch = min(LARGEST_BATCH, 1 << max(source.num_samples.bit_length() - 1, 0))
    return load_config(PretrainConfig, None, [*settings, f"train.global_batch={batch}"])


def measure_loader(
    config: PretrainConfig,
    *,
    epochs: int,
    num_ranks: int,
    device: torch.device,
    fingerprint: bool,
    on_report: Callable[[LoaderReport], None] | None = None,
) -> dict[str, Any]:
    """Load whole epochs for all ranks, one rank after the other; errors as for `TubeletLoader`.

    Returns the report of `mcl bench loader --json`; `on_report` gets the loader's report after every batch. With
    `fingerprint`, its `digest` covers the videos in the order of the global batches (id, order label, boxes, pixels of
    the views, target), so it does not depend on the number of ranks.
    """
    totals = _Totals()
    for rank in range(num_ranks):
        start = time.perf_counter()
        loader = TubeletLoader(
            config.data,
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            rank=rank,
            num_ranks=num_ranks,
            grid=config.encoder.grid(config.data.frames, config.data.crop),
            device=device,
            epochs=epochs,
        )
        with closing(loader):
            _measure_rank(loader, start, rank, totals, fingerprint=fingerprint, on_report=on_report)
    report = _report(totals)
    if fingerprint:
        digests = b"".join(totals.digests[position] for position in sorted(totals.digests))
        report["digest"] = hashlib.sha256(digests).hexdigest()
    return report


def _report(totals: _Totals) -> dict[str, Any]:
    stage_seconds = {stage: seconds / totals.measured for stage, seconds in totals.stage_seconds.items()}
    cpu = totals.cpu / totals.measured
    return {
        "videos": totals.videos,
        "videos_per_second": totals.measured / totals.wall,
        "cpu_seconds_per_video": cpu,
        "stages": {**stage_seconds, "other": cpu - sum(stage_seconds.values())},
        "replaced": totals.replaced,
        "unaccounted": totals.unaccounted,
        "bytes_read": totals.bytes_read,
        "bytes_decoded": totals.bytes_decoded,
        "first_batch_seconds": totals.first_batch_seconds,
        # Linux reports KiB. The sum of the peaks of this process and of its workers, which need not coincide.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + totals.worker_peak,
    }


def _measure_rank(
    loader: TubeletLoader,
    start: float,
    rank: int,
    totals: _Totals,
    *,
    fingerprint: bool,
    on_report: Callable[[LoaderReport], None] | None,
) -> None:
    """Load all batches of a rank; if there is more than one, timing starts after the first."""
    before, excluded = _Readings(start, time.process_time(), Counter()), 0
    videos = 0
    for step, batch in enumerate(loader):
        if fingerprint:
            totals.digests[step, rank] = b"".join(_digests(batch))
        videos += len(batch.samples)
        if on_report is not None:
            on_report(loader.report())
        if step == 0:
            totals.first_batch_seconds = max(totals.first_batch_seconds, time.perf_counter() - start)
        if step == 0 and loader.num_steps != 1:
            before, excluded = _readings(loader), videos
    after = _readings(loader)
    totals.videos += videos
    totals.measured += videos - excluded
    totals.wall += after.wall - before.wall
    totals.cpu += after.cpu - before.cpu
    totals.stage_seconds.update(after.stage_seconds - before.stage_seconds)
    report = loader.report()
    totals.bytes_read += report.storage["bytes_read"]
    totals.bytes_decoded += report.storage["bytes_decoded"]
    totals.unaccounted += report.expected - report.delivered - report.replaced
    totals.replaced += report.replaced
    totals.worker_peak = max(totals.worker_peak, report.worker_peak_bytes)


class _Readings(NamedTuple):
    """Clocks at one moment."""

    wall: float
    cpu: float
    stage_seconds: Counter[str]


def _readings(loader: TubeletLoader) -> _Readings:
    report = loader.report()
    return _Readings(time.perf_counter(), time.process_time() + report.worker_cpu_seconds, Counter(report.stages))


def _digests(batch: TubeletBatch) -> Iterable[bytes]:
    """The digest of each video of a batch, in order."""
    for parts in zip(batch.samples, batch.order, batch.boxes, batch.views, batch.motion, strict=True):
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy())
        yield digest.digest()

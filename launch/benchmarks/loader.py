"""How fast the loader is, what it costs by stage, and a digest of what it delivers."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
class _Played:
    """What came of playing all ranks; the figures leave each rank's first batch out where there are more."""

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
    stages: Counter[str] = field(default_factory=Counter)
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)


def benchmark_settings(url: str, config: str | None, overrides: Sequence[str], cache: str) -> PretrainConfig:
    """A run's settings on the set at `url`, which is kept in the folder `cache` if no other is given.

    Without a configuration file the global batch is the largest power of two that the set has videos for, up
    to 32, so that it has room for 1, 2 or 4 ranks.

    Raises:
        UserError: the set cannot be read.
        ConfigError: an unknown key or a value out of range.
    """
    given = [f"data.train={json.dumps(url)}", "run.dir=none", f"data.cache={json.dumps(cache)}", *overrides]
    settings = load_config(PretrainConfig, config, given)
    if config is not None or any(override.startswith("train.global_batch=") for override in overrides):
        return settings
    usable = _usable(settings)
    batch = min(LARGEST_BATCH, 1 << max(usable.bit_length() - 1, 0))
    return load_config(PretrainConfig, None, [*given, f"train.global_batch={batch}"])


def _usable(settings: PretrainConfig) -> int:
    """Videos that are long enough, of all sets."""
    alone = LoaderShard(settings.run.seed, global_batch=1, rank=0, num_ranks=1, grid=(1, 1, 1))
    source = alone.source(settings.data)
    try:
        return source.num_samples
    finally:
        source.close()


def measure_loader(
    settings: PretrainConfig,
    *,
    epochs: int,
    num_ranks: int,
    device: torch.device,
    fingerprint: bool,
    listen: Callable[[LoaderReport], None] | None = None,
) -> dict[str, Any]:
    """Play whole epochs of all ranks, one rank after the other.

    Args:
        settings: of the run that is played.
        epochs: passes over the set.
        num_ranks: that are played.
        device: what decodes.
        fingerprint: whether to hash what comes.
        listen: is told after every batch what its rank's loader has done.

    Returns:
        The report of `mcl bench loader --json`. Its `digest` is over the videos in the order of the global
        batches (id, order label, boxes, pixels of the views, target), so it does not depend on the ranks.

    Raises:
        UserError, ConfigError: as `TubeletLoader`.
    """
    played = _Played()
    for rank in range(num_ranks):
        loader, start = _loader(settings, epochs, rank, num_ranks, device)
        try:
            _play(loader, start, rank, played, fingerprint=fingerprint, listen=listen)
        finally:
            loader.close()
    stages = {stage: seconds / played.measured for stage, seconds in played.stages.items()}
    cpu = played.cpu / played.measured
    report = {
        "videos": played.videos,
        "videos_per_second": played.measured / played.wall,
        "cpu_seconds_per_video": cpu,
        "stages": {**stages, "other": cpu - sum(stages.values())},
        "replaced": played.replaced,
        "unaccounted": played.unaccounted,
        "bytes_read": played.bytes_read,
        "bytes_decoded": played.bytes_decoded,
        "first_batch_seconds": played.first_batch_seconds,
        # Told in KiB; the most that this process and all workers held, each at its own time.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + played.worker_peak,
    }
    if fingerprint:
        in_order = b"".join(played.digests[place] for place in sorted(played.digests))
        report["digest"] = hashlib.sha256(in_order).hexdigest()
    return report


def _loader(
    settings: PretrainConfig, epochs: int, rank: int, num_ranks: int, device: torch.device
) -> tuple[TubeletLoader, float]:
    """A rank's loader of so many epochs, and the time when it was asked for."""
    start = time.perf_counter()
    loader = TubeletLoader(
        settings.data,
        seed=settings.run.seed,
        global_batch=settings.train.global_batch,
        rank=rank,
        num_ranks=num_ranks,
        grid=settings.encoder.grid(settings.data.frames, settings.data.crop),
        device=device,
        epochs=epochs,
    )
    return loader, start


def _play(
    loader: TubeletLoader,
    start: float,
    rank: int,
    played: _Played,
    *,
    fingerprint: bool,
    listen: Callable[[LoaderReport], None] | None,
) -> None:
    """Take all of a rank's batches; where there are more than one, the clocks start after the first."""
    before, left_out = _Marks(start, time.process_time(), Counter()), 0
    videos = 0
    for step, batch in enumerate(loader):
        if fingerprint:
            played.digests[step, rank] = b"".join(_digests(batch))
        videos += len(batch.samples)
        if listen is not None:
            listen(loader.report())
        if step == 0:
            played.first_batch_seconds = max(played.first_batch_seconds, time.perf_counter() - start)
        if step == 0 and loader.num_steps != 1:
            before, left_out = _marks(loader), videos
    after = _marks(loader)
    played.videos += videos
    played.measured += videos - left_out
    played.wall += after.wall - before.wall
    played.cpu += after.cpu - before.cpu
    played.stages.update(after.stages - before.stages)
    report = loader.report()
    played.bytes_read += report.storage["bytes_read"]
    played.bytes_decoded += report.storage["bytes_decoded"]
    played.unaccounted += report.expected - report.delivered - report.replaced
    played.replaced += report.replaced
    played.worker_peak = max(played.worker_peak, report.worker_peak_bytes)


class _Marks(NamedTuple):
    """Where the clocks stand."""

    wall: float
    cpu: float
    stages: Counter[str]


def _marks(loader: TubeletLoader) -> _Marks:
    report = loader.report()
    return _Marks(time.perf_counter(), time.process_time() + report.worker_cpu_seconds, Counter(report.stages))


def _digests(batch: TubeletBatch) -> Iterable[bytes]:
    """Of each video of a batch, in order."""
    for parts in zip(batch.samples, batch.order, batch.boxes, batch.views, batch.motion, strict=True):
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy())
        yield digest.digest()

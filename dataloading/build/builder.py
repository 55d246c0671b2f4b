"""Builds a shard set from the videos of a source: shuffle, process, write shards, write the manifest."""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataloading.build.build_lock import LEASE, BuildLock, hold_build_lock
from dataloading.build.config import BuildConfig
from dataloading.build.journal import FinishedShard, check_record, read_finished, remove_journals
from dataloading.build.local_executor import Executor
from dataloading.build.near_duplicates import VideoHash, near_duplicates
from dataloading.build.video_processor import ProcessedVideo, VideoProcessor, VideoResult
from dataloading.shards.format import (
    MANIFEST,
    REPORT,
    SHARD_NAME,
    Manifest,
    RefusedVideo,
    ShardEntry,
    ShardWriter,
    index_name,
    read_complete_manifest,
    sha256,
    shard_name,
)
from dataloading.videos.sources import Source, SourceFolder
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder, readable_errors
from mcl_dist.storage.retry import RetryPolicy

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ResumedBuild:
    """First event of a build that found traces of an earlier one.

    Attributes:
        previous_holder: the builder whose expired lease was taken over, None without one.
        num_shards, num_videos, num_refused: finished shards that are kept, videos in them, and videos refused so far.
    """

    previous_holder: str | None
    num_shards: int
    num_videos: int
    num_refused: int


Listener = Callable[[VideoResult | ResumedBuild], None]


def build_shards(
    sources: SourceFolder, destination: Folder, config: BuildConfig, executor: Executor, listen: Listener
) -> Manifest:
    """Build the shard set of `sources`, or resume an unfinished build of it.

    Calls `listen` with the result of every video, in the order of the set; skips the shards that an earlier run
    finished. The bytes depend only on the sources and `config`, not on the executor or interruptions. The manifest
    is written last and makes the set valid. Requests to both stores follow the destination's retry policy, which
    counts their failures.

    Raises:
        UserError: no usable video (then nothing is left behind), a failing or full store or disk, a dead worker,
            another builder at the destination, an unfinished build or a complete set of other videos or another
            configuration there.
    """
    start = time.monotonic()
    record = build_record(sources, config)
    with hold_build_lock(destination) as lock:
        manifest = _read_complete_set(destination, record)
        if manifest is not None:  # another builder finished it after the caller checked
            return manifest
        build = _Build(destination, lock, config, record)
        build.resume(listen)
        num_built = build.run(sources, executor, listen)
        manifest = build.manifest(sources.classes)
        _check_files(destination, manifest)
        lock.check()
        report = {
            **summarise_set(manifest, time.monotonic() - start, num_built),
            **executor.description,
            "retries": dict(destination.retry.failures),
        }
        destination.write(REPORT, json.dumps(report, indent=1).encode() + b"\n")
        destination.write(MANIFEST, manifest.to_json())
        remove_journals(destination)
    return manifest


def find_complete_set(destination: Folder, sources: SourceFolder, config: BuildConfig) -> Manifest | None:
    """The manifest of a complete set at the destination that equals the one to be built, None without a set.

    Raises:
        UserError: the complete set is damaged, or was built from other videos or with another configuration.
    """
    return _read_complete_set(destination, build_record(sources, config))


def summarise_set(manifest: Manifest, seconds: float, num_built: int) -> dict[str, Any]:
    """Figures of the set for `build.json` and the closing table, and the time for `num_built` of its videos."""
    kinds = Counter(video.reason.partition(":")[0] for video in manifest.refused)
    return {
        "videos": manifest.num_videos,
        "frames": manifest.num_frames,
        "hours": round(manifest.num_seconds / 3600, 3),
        "shards": len(manifest.shards),
        "bytes": manifest.num_bytes,
        "refused": dict(sorted(kinds.items())),
        "near_duplicates": len(manifest.near_duplicates),
        "seconds": round(seconds, 3),
        "seconds_per_video": round(seconds / num_built, 3) if num_built else 0.0,
    }


def remove_leftovers(destination: Folder) -> None:
    """Remove the journals and the lease of a builder that was killed right after it wrote the manifest."""
    remove_journals(destination)
    destination.remove(LEASE)


def build_record(sources: SourceFolder, config: BuildConfig) -> dict[str, Any]:
    """The manifest's record of what a set is built from: the configuration and a digest of the list of videos."""
    return {**config.record(), "sources": sources.digest()}


def _read_complete_set(destination: Folder, record: dict[str, Any]) -> Manifest | None:
    if not destination.exists(MANIFEST):
        return None
    manifest = read_complete_manifest(destination)
    check_record(destination, "a shard set built with", manifest.build, record)
    return manifest


class _Build:
    """Builds the missing shards of one set.

    A shard ends with the video that fills it, so shard boundaries do not depend on interruptions.
    """

    def __init__(self, destination: Folder, lock: BuildLock, config: BuildConfig, record: dict[str, Any]) -> None:
        self._destination = destination
        self._lock = lock
        self._config = config
        self._record = record
        self._shards: list[FinishedShard] = []
        self._num_processed = 0
        # Of the shard that is being filled:
        self._seconds = 0.0
        self._hashes: list[VideoHash] = []
        self._refused: list[RefusedVideo] = []

    def resume(self, listen: Listener) -> None:
        """Keep the shards that an earlier run finished."""
        self._shards = read_finished(self._destination, self._record)
        if self._shards:
            self._num_processed = self._shards[-1].num_processed
        if self._shards or self._lock.previous_holder:
            num_videos = sum(shard.entry.samples for shard in self._shards)
            num_refused = sum(len(shard.refused) for shard in self._shards)
            listen(ResumedBuild(self._lock.previous_holder, len(self._shards), num_videos, num_refused))

    def run(self, sources: SourceFolder, executor: Executor, listen: Listener) -> int:
        """Process the remaining videos and write their shards; returns the number of these videos."""
        retry = self._destination.retry
        processor = VideoProcessor(sources.root, sources.classes, self._config, retry.seconds, retry.request_seconds)
        remaining = _shuffle(sources, self._config.seed)[self._num_processed :]
        with executor.map(processor.process, remaining) as processed:
            results = _report_results(processed, retry, listen)
            while self._write_shard(results):
                pass
        if not self._shards:
            raise UserError(
                f"{sources.root}: none of its {len(sources.videos)} videos can be used; nothing was written"
            )
        return len(remaining)

    def manifest(self, classes: tuple[str, ...]) -> Manifest:
        """The manifest of all finished shards."""
        refused = [video for shard in self._shards for video in shard.refused] + self._refused
        duplicates = near_duplicates([video for shard in self._shards for video in shard.hashes])
        entries = tuple(shard.entry for shard in self._shards)
        return Manifest(self._record, classes, entries, tuple(refused), duplicates)

    def _write_shard(self, results: Iterator[VideoResult]) -> bool:
        """Write and publish the next shard; False when no sample is left."""
        path = self._lock.work / shard_name(len(self._shards))
        with ShardWriter(path) as writer:
            self._fill(writer, results)
        if not writer.num_samples:
            path.unlink(missing_ok=True)
            return False
        self._lock.check()
        entry = replace(_publish(writer, self._destination, path), seconds=round(self._seconds, 3))
        shard = FinishedShard(self._record, entry, tuple(self._refused), self._num_processed, tuple(self._hashes))
        shard.write(self._destination)
        self._shards.append(shard)
        self._refused.clear()
        self._hashes.clear()
        self._seconds = 0.0
        return True

    def _fill(self, writer: ShardWriter, results: Iterator[VideoResult]) -> None:
        max_bytes = self._config.shard_megabytes * MEGABYTE
        for result in results:
            self._num_processed += 1
            if isinstance(result, RefusedVideo):
                self._refused.append(result)
                continue
            writer.add(result)
            self._seconds += result.seconds
            self._hashes.append(VideoHash(result.info["source"], result.info["dhash"]))
            if writer.num_bytes >= max_bytes:
                return


def _shuffle(sources: SourceFolder, seed: int) -> list[Source]:
    videos = list(sources.videos)
    random.Random(seed).shuffle(videos)
    return videos


def _report_results(processed: Iterator[ProcessedVideo], retry: RetryPolicy, listen: Listener) -> Iterator[VideoResult]:
    for video in processed:
        retry.failures.update(video.failures)
        listen(video.result)
        yield video.result


def _publish(writer: ShardWriter, destination: Folder, shard: Path) -> ShardEntry:
    """Move the local shard and its index to the destination."""
    index = writer.index()
    index_data = index.to_bytes()
    digest = hashlib.sha256()
    with readable_errors(str(shard)):
        with shard.open("rb") as file:
            while block := file.read(MEGABYTE):
                digest.update(block)
        size = shard.stat().st_size
    destination.put(shard, shard.name)
    shard.unlink(missing_ok=True)
    destination.write(index_name(shard.name), index_data)
    return ShardEntry(shard.name, len(index), int(index.num_frames.sum()), size, digest.hexdigest(), sha256(index_data))


def _check_files(destination: Folder, manifest: Manifest) -> None:
    """Check that every file of the manifest exists, and remove shards that the manifest does not name."""
    named = {shard.name for shard in manifest.shards}
    present = set(destination.names())
    for name in sorted(named | set(map(index_name, named))):
        if name not in present:
            raise UserError(f"{destination.url}/{name}: missing after it was written; run the same command again")
    for name in present:
        if SHARD_NAME.fullmatch(name) and name not in named:
            destination.remove(name)
            destination.remove(index_name(name))

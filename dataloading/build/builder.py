"""From a folder of class folders of videos to a shard set: scan, shuffle, process, write, manifest."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataloading.build.build_lock import LEASE, BuildLock, claimed
from dataloading.build.journal import FinishedShard, check_record, read_finished, remove_journals
from dataloading.build.local_executor import Executor
from dataloading.build.near_duplicates import VideoHash, near_duplicates
from dataloading.build.video_processor import BuildConfig, Processed, VideoOutcome, VideoProcessor
from dataloading.shards.format import (
    MANIFEST,
    REPORT,
    SHARD_NAME,
    Manifest,
    RefusedVideo,
    ShardEntry,
    ShardWriter,
    index_name,
    read_manifest,
    sha256,
    shard_name,
)
from dataloading.videos.sources import Source, SourceFolder
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder, naming
from mcl_dist.storage.retry import RetryPolicy

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ResumedBuild:
    """Told first when an earlier run left something: whose lease had run out, and what is kept of its shards."""

    taken_from: str | None
    shards: int
    videos: int
    refused: int


Listener = Callable[[VideoOutcome | ResumedBuild], None]


def build_shards(
    sources: SourceFolder, destination: Folder, config: BuildConfig, executor: Executor, listen: Listener
) -> Manifest:
    """Build the shard set of a folder of class folders of videos, or go on with an unfinished build of it.

    `listen` is told every video's outcome, in the order of the set, but for those in shards that an earlier
    run finished. Bytes depend on the sources and `config` alone, not on the executor or interruptions. Nothing
    counts before the manifest, which is written last. What the stores of videos and set did not do at once is
    asked for again with the destination's patience, which counts it.

    Raises:
        UserError: none of the videos is usable (nothing is left behind then), storage that fails or is
            full, a worker that died, another builder at the destination, an unfinished build or a complete
            set of other videos or another configuration there.
    """
    start = time.monotonic()
    record = build_record(sources, config)
    patience = destination.patience
    processor = VideoProcessor(sources.root, sources.classes, config, patience.seconds, patience.request_seconds)
    videos = _shuffled(sources, config)
    with claimed(destination) as claim:
        manifest = _complete(destination, record)
        if manifest is not None:  # finished by another builder since the caller looked
            return manifest
        shards = read_finished(destination, record)
        _tell_kept(shards, claim, listen)
        taken = shards[-1].taken if shards else 0
        with executor.map(processor.processed, videos[taken:]) as processed:
            rest = _Rest(destination, claim, config, record, shards, taken)
            rest.build(_told(processed, patience, listen))
        if not shards:
            raise UserError(
                f"{sources.root}: none of its {len(sources.videos)} videos can be used; nothing was written"
            )
        refused = [video for shard in shards for video in shard.refused] + rest.refused
        alike = near_duplicates([look for shard in shards for look in shard.looks])
        manifest = Manifest(record, sources.classes, tuple(shard.entry for shard in shards), tuple(refused), alike)
        _check_whole(destination, manifest)
        claim.check()
        report = {
            **summary(manifest, time.monotonic() - start, len(videos) - taken),
            **executor.description,
            "retries": dict(patience.failures),
        }
        destination.write(REPORT, json.dumps(report, indent=1).encode() + b"\n")
        destination.write(MANIFEST, manifest.to_json())
        remove_journals(destination)
    return manifest


def existing_set(destination: Folder, sources: SourceFolder, config: BuildConfig) -> Manifest | None:
    """The complete set that is there already, when it is the one that would be built.

    Raises:
        UserError: a complete set of other videos or another configuration, or a damaged one, is there.
    """
    return _complete(destination, build_record(sources, config))


def summary(manifest: Manifest, seconds: float, num_built: int) -> dict[str, Any]:
    """What a person wants to know at the end: the set in figures, and what `num_built` of its videos took now."""
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


def remove_traces(destination: Folder) -> None:
    """Remove from a complete set what its builder, killed right after the manifest, could not."""
    remove_journals(destination)
    destination.remove(LEASE)


def build_record(sources: SourceFolder, config: BuildConfig) -> dict[str, Any]:
    """What the manifest says a set was built from: the configuration and a digest of the list of videos."""
    return {**config.record(), "sources": sources.digest()}


def _shuffled(sources: SourceFolder, config: BuildConfig) -> list[Source]:
    videos = list(sources.videos)
    random.Random(config.seed).shuffle(videos)
    return videos


def _complete(destination: Folder, record: dict[str, Any]) -> Manifest | None:
    if not destination.exists(MANIFEST):
        return None
    manifest = read_manifest(destination)
    check_record(destination, "a shard set built with", manifest.build, record)
    return manifest


def _tell_kept(shards: list[FinishedShard], claim: BuildLock, listen: Listener) -> None:
    if shards or claim.taken_from:
        num_stored = sum(shard.entry.samples for shard in shards)
        num_refused = sum(len(shard.refused) for shard in shards)
        listen(ResumedBuild(claim.taken_from, len(shards), num_stored, num_refused))


def _told(processed: Iterator[Processed], patience: RetryPolicy, listen: Listener) -> Iterator[VideoOutcome]:
    for each in processed:
        patience.failures.update(each.failures)
        listen(each.outcome)
        yield each.outcome


class _Rest:
    """Builds the shards that are still missing, and adds them to `shards`.

    A shard ends with the video that fills it: where shards begin and end does not depend on interruptions.

    Attributes:
        refused: videos refused since the last finished shard.
    """

    def __init__(
        self,
        destination: Folder,
        claim: BuildLock,
        config: BuildConfig,
        record: dict[str, Any],
        shards: list[FinishedShard],
        taken: int,
    ) -> None:
        self._destination = destination
        self._claim = claim
        self._num_bytes = config.shard_megabytes * MEGABYTE
        self._record = record
        self._shards = shards
        self._taken = taken
        self._seconds = 0.0
        self._looks: list[VideoHash] = []
        self.refused: list[RefusedVideo] = []

    def build(self, outcomes: Iterator[VideoOutcome]) -> None:
        """Take all outcomes that are left."""
        while True:
            shard = self._claim.work / shard_name(len(self._shards))
            with ShardWriter(shard) as writer:
                self._fill(writer, outcomes)
            if not writer.num_samples:
                shard.unlink(missing_ok=True)
                return
            self._claim.check()
            entry = replace(_publish(writer, self._destination, shard), seconds=round(self._seconds, 3))
            finished = FinishedShard(self._record, entry, tuple(self.refused), self._taken, tuple(self._looks))
            finished.write(self._destination)
            self._shards.append(finished)
            self.refused.clear()
            self._looks.clear()
            self._seconds = 0.0

    def _fill(self, writer: ShardWriter, outcomes: Iterator[VideoOutcome]) -> None:
        for outcome in outcomes:
            self._taken += 1
            if isinstance(outcome, RefusedVideo):
                self.refused.append(outcome)
                continue
            writer.add(outcome)
            self._seconds += outcome.seconds
            self._looks.append(VideoHash(outcome.info["source"], outcome.info["dhash"]))
            if writer.num_bytes >= self._num_bytes:
                return


def _publish(writer: ShardWriter, destination: Folder, shard: Path) -> ShardEntry:
    index = writer.index()
    index_data = index.to_bytes()
    digest = hashlib.sha256()
    with naming(str(shard)):
        with shard.open("rb") as file:
            while block := file.read(MEGABYTE):
                digest.update(block)
        size = shard.stat().st_size
    destination.put(shard, shard.name)
    shard.unlink(missing_ok=True)
    destination.write(index_name(shard.name), index_data)
    return ShardEntry(shard.name, len(index), int(index.num_frames.sum()), size, digest.hexdigest(), sha256(index_data))


def _check_whole(destination: Folder, manifest: Manifest) -> None:
    """Remove shards that an interrupted build of more videos left, and miss none that the manifest names."""
    named = {shard.name for shard in manifest.shards}
    present = set(destination.names())
    for name in sorted(named | set(map(index_name, named))):
        if name not in present:
            raise UserError(f"{destination.url}/{name}: gone since it was written; run the same command again")
    for name in present:
        if SHARD_NAME.fullmatch(name) and name not in named:
            destination.remove(name)
            destination.remove(index_name(name))

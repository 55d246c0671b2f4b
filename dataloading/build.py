"""From a folder of class folders of videos to a shard set: scan, shuffle, process, write, manifest."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataloading.flow import BOUND
from dataloading.process import BuildConfig, Outcome, VideoProcessor
from dataloading.shards import (
    MANIFEST,
    SHARD_NAME,
    Manifest,
    RefusedVideo,
    Sample,
    ShardEntry,
    ShardWriter,
    index_name,
    read_manifest,
    sha256,
)
from dataloading.sources import Source, SourceFolder
from dataloading.workers import ordered_map
from mcl_dist.errors import UserError
from mcl_dist.storage import Folder

WORK_FOLDER = ".building"
MEGABYTE = 1_000_000
Listener = Callable[[Outcome], None]


def build_shards(
    sources: SourceFolder, destination: Folder, config: BuildConfig, workers: int, listen: Listener
) -> Manifest:
    """Build the shard set of a folder of class folders of videos.

    `listen` is told every video's outcome, in the order of the set. Bytes depend on the sources and
    `config` alone, not on `workers`. Nothing counts before the manifest, which is written last.

    Raises:
        UserError: none of the videos is usable (nothing is left behind then), storage that fails or is
            full, a worker that died.
    """
    processor = VideoProcessor(sources.root, sources.classes, config)
    refused: list[RefusedVideo] = []
    videos = _shuffled(sources, config)
    with _work_folder(destination) as work, ordered_map(processor, videos, workers) as outcomes:
        samples = _stored(outcomes, refused, listen)
        shards = tuple(_write_shards(samples, destination, work, config))
    if not shards:
        raise UserError(f"{sources.root}: none of its {len(sources.videos)} videos can be used; nothing was written")
    manifest = Manifest(build_record(sources, config), sources.classes, shards, tuple(refused))
    _remove_strays(destination, manifest)
    destination.write(MANIFEST, manifest.to_json())
    return manifest


def existing_set(destination: Folder, sources: SourceFolder, config: BuildConfig) -> Manifest | None:
    """The complete set that is there already, when it is the one that would be built.

    Raises:
        UserError: a complete set of other videos or another configuration, or a damaged one, is there.
    """
    if not destination.exists(MANIFEST):
        return None
    manifest = read_manifest(destination)
    record = build_record(sources, config)
    differing = [name for name in sorted(record | manifest.build) if record.get(name) != manifest.build.get(name)]
    if differing:
        raise UserError(
            f"{destination.url}: holds a shard set built with another {', '.join(differing)}; "
            "name another folder, or remove this one"
        )
    return manifest


def build_record(sources: SourceFolder, config: BuildConfig) -> dict[str, Any]:
    """What the manifest says a set was built from: the configuration and a digest of the list of videos."""
    return {**asdict(config), "flow_bound": BOUND, "sources": sources.digest()}


def _shuffled(sources: SourceFolder, config: BuildConfig) -> list[Source]:
    videos = list(sources.videos)
    random.Random(config.seed).shuffle(videos)
    return videos


@contextmanager
def _work_folder(destination: Folder) -> Iterator[Path]:
    """A folder for shards being written: on the destination's own disk where it has one."""
    if not destination.is_local:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    work = Path(destination.path(WORK_FOLDER))
    is_new = not work.parent.exists()
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{destination.url}: {error.strerror}; name a folder that can be written to") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new and not any(work.parent.iterdir()):
            work.parent.rmdir()


def _stored(outcomes: Iterator[Outcome], refused: list[RefusedVideo], listen: Listener) -> Iterator[Sample]:
    for outcome in outcomes:
        listen(outcome)
        if isinstance(outcome, Sample):
            yield outcome
        else:
            refused.append(outcome)


def _write_shards(
    samples: Iterator[Sample], destination: Folder, work: Path, config: BuildConfig
) -> Iterator[ShardEntry]:
    sample = next(samples, None)
    number = 0
    while sample is not None:
        name = f"shard-{number:06d}.tar"
        with ShardWriter(work / name) as writer:
            while sample is not None and writer.num_bytes < config.shard_megabytes * MEGABYTE:
                writer.add(sample)
                sample = next(samples, None)
        yield _publish(writer, destination, work / name)
        number += 1


def _publish(writer: ShardWriter, destination: Folder, shard: Path) -> ShardEntry:
    index = writer.index()
    index_data = index.to_bytes()
    with shard.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(MEGABYTE):
            digest.update(block)
    size = shard.stat().st_size
    destination.put(shard, shard.name)
    shard.unlink()
    destination.write(index_name(shard.name), index_data)
    return ShardEntry(shard.name, len(index), int(index.num_frames.sum()), size, digest.hexdigest(), sha256(index_data))


def _remove_strays(destination: Folder, manifest: Manifest) -> None:
    """Shards that an interrupted build of more videos left."""
    named = {shard.name for shard in manifest.shards}
    for name in destination.names():
        if SHARD_NAME.fullmatch(name) and name not in named:
            destination.remove(name)
            destination.remove(index_name(name))

"""`killed_fetchers.py FOLDER N`: kill N processes while they fetch shards into one cache; print kills and leftovers.

Two processes at a time read the same set through a cache of half its size. One is killed; the other must continue and
verify every sample.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import fsspec
import numpy as np

from dataloading.reading.fetcher import FetchConfig
from dataloading.reading.file_lock import lock_file
from dataloading.reading.shard_set import ShardSet
from dataloading.shards.format import Manifest, Sample, ShardEntry, ShardWriter, index_name, sha256

NUM_SHARDS = 8
URL = "memory://killed/set"
JPEG = b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x10\x00\x10"  # a header of 16x16 pixels; nothing else is checked


def write_set(folder: Path) -> int:
    """Write shards of some megabytes; returns the size of one."""
    entries, rng = [], np.random.default_rng(0)
    for number in range(NUM_SHARDS):
        path = folder / f"shard-{number:06d}.tar"
        stills = [JPEG + rng.bytes(400_000) + b"\xff\xd9" for _ in range(3)]
        sides = {"height": 16, "width": 16, "flow_height": 8, "flow_width": 16}
        info = {"label": 0, "frames": 3, **sides}
        maps, scores = np.zeros((3, 7, 7), np.uint8), np.ones(1, np.float32)
        with ShardWriter(path) as writer:
            writer.add(Sample(f"video-{number}", info, stills, stills, maps, scores))
        index, data = writer.index().to_bytes(), path.read_bytes()
        fsspec.filesystem("memory").pipe(
            {f"/killed/set/{path.name}": data, f"/killed/set/{index_name(path.name)}": index}
        )
        entries.append(ShardEntry(path.name, 1, 3, len(data), sha256(data), sha256(index)))
        path.unlink()
    manifest = Manifest({}, ("only",), tuple(entries), ())
    fsspec.filesystem("memory").pipe("/killed/set/manifest.json", manifest.to_json())
    return entries[0].bytes


def read_all(cache: Path, limit: int, rounds: int) -> None:
    """Read all samples in random orders; the reader verifies every byte."""
    shards = ShardSet(URL, str(cache), FetchConfig(cache_limit=limit))
    for _ in range(rounds):
        order = random.sample(range(NUM_SHARDS), NUM_SHARDS)
        for number, position in enumerate(order):
            shards.expect(order[number:])
            video = shards.read(position)
            if len(video.frames(range(3)) + video.flow(range(3))) != 6:
                os._exit(3)


def start(cache: Path, limit: int, rounds: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        read_all(cache, limit, rounds)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(4)
    os._exit(0)


def is_abandoned(partial: Path) -> bool:
    """Whether no process writes the file any more."""
    file = lock_file(partial, wait=False)
    if file is None:
        return False
    file.close()
    return True


def main(folder: Path, num_kills: int) -> None:
    cache, limit = folder / "cache", write_set(folder) * NUM_SHARDS // 2
    half_written = 0
    rng = random.Random(0)
    for _ in range(num_kills):
        killed, survivor = start(cache, limit, 1000), start(cache, limit, 1)
        time.sleep(rng.uniform(0.01, 0.06))  # a random moment of a fetch
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        half_written += any(map(is_abandoned, cache.glob("*.partial")))
        _, status = os.waitpid(survivor, 0)
        if status:
            sys.exit(f"the survivor ended with {status}")
        for path in cache.glob("*.tar"):
            if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem:
                sys.exit(f"{path} has its final name and is not whole")
    print(num_kills, half_written)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

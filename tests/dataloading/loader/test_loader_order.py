"""What a run's global batches hold, whatever the ranks, workers, restarts and damage."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloading.loader.batch_maker import BatchMaker
from dataloading.loader.config import DataConfig, SetConfig
from dataloading.loader.loader import TubeletLoader
from dataloading.loader.serialization import pack, unpack
from dataloading.loader.shared_memory import SharedArrays
from dataloading.loader.video_source import VideoSource
from dataloading.reading.shard_set import ShardSet
from mcl_dist.batch import TubeletBatch
from mcl_dist.errors import ConfigError, UserError

WriteSet = Callable[..., Path]
Digests = list[bytes]

LENGTHS = [9, 30, 8, 20, 10, 17, 8, 40, 16, 25, 12, 11, 33, 9, 19, 21, 8, 13, 14, 10, 9, 22]
GLOBAL_BATCH = 4
GRID = (1, 7, 7)


@pytest.fixture
def config(write_set: WriteSet) -> DataConfig:
    return DataConfig(str(write_set(LENGTHS)), frames=4, stride=2, crop=28, shuffle_window=2, max_bad_fraction=0.5)


def loader(config: DataConfig, **options: Any) -> TubeletLoader:
    asked: dict[str, Any] = {"rank": 0, "num_ranks": 1, "seed": 5, "grid": GRID, "global_batch": GLOBAL_BATCH}
    return TubeletLoader(config, device=torch.device("cpu"), **(asked | options))


def digest(batch: TubeletBatch) -> Iterator[bytes]:
    for parts in zip(*vars(batch).values(), strict=True):
        yield hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).digest()


def play(config: DataConfig, num_ranks: int = 1, **options: Any) -> Digests:
    """Digests of all videos of the global batches in order; nothing may be missing of what was expected."""
    ranks = []
    for rank in range(num_ranks):
        one = loader(config, rank=rank, num_ranks=num_ranks, **{"epochs": 2} | options)
        try:
            ranks.append([list(digest(batch)) for batch in one])
            report = one.report()
            assert report.expected == report.delivered + report.replaced == sum(map(len, ranks[-1]))
        finally:
            one.close()
    return [video for step in zip(*ranks, strict=True) for share in step for video in share]


def ids(config: DataConfig, **options: Any) -> list[int]:
    one = loader(config, **{"epochs": 2} | options)
    try:
        return [sample for batch in one for sample in batch.samples.tolist()]
    finally:
        one.close()


def damage(config: DataConfig, positions: list[int]) -> set[str]:
    """Flip a byte of every still of these samples; returns their keys."""
    folder = Path(str(config.train))
    shards = ShardSet(str(folder))
    for position in positions:
        video = shards.read(position)
        name, _, _ = video.where.rpartition("/")[2].partition(",")
        with (folder / name).open("r+b") as file:
            for offset, size in video._index.stills(video._sample, "frames").tolist():
                file.seek(offset + size // 2)
                byte = file.read(1)[0]
                file.seek(offset + size // 2)
                file.write(bytes([byte ^ 255]))
    return {str(shards.keys[position]) for position in positions}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [[], [3, 4, 11]])
def test_ranks_workers_and_restarts_do_not_change_two_epochs(config: DataConfig, bad: list[int]) -> None:
    damage(config, bad)
    whole = play(config)

    for num_ranks, workers in ((2, 0), (4, 0), (1, 1), (1, 3), (2, 1)):
        assert play(replace(config, workers=workers), num_ranks) == whole, (num_ranks, workers)
    for step in range(0, 10, 3):
        assert play(config, start_step=step) == whole[step * GLOBAL_BATCH :], step
    half = 5
    before, after = play(config, 2)[: half * GLOBAL_BATCH], play(config, 4, start_step=half)
    assert before + after == whole


@pytest.mark.slow
def test_restarts_at_every_tenth_step_do_not_change_two_epochs(config: DataConfig) -> None:
    config = replace(config, lanes=1)
    whole = play(config, global_batch=1)
    assert len(whole) == 2 * len(LENGTHS)

    for step in range(0, len(whole), 10):
        assert play(config, global_batch=1, start_step=step) == whole[step:]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_no_sample_is_missing_or_repeated_in_an_epoch(config: DataConfig, lanes: int) -> None:
    config = replace(config, lanes=lanes)
    for num_videos, per_epoch in ((GLOBAL_BATCH, 20), (2, 22)):
        if num_videos % lanes == 0:
            played = ids(config, global_batch=num_videos)
            for epoch in (played[:per_epoch], played[per_epoch:]):
                assert len(epoch) == len(set(epoch)) == per_epoch


def test_lanes_that_do_not_divide_the_batch_are_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: found 3, must divide train\.global_batch \(4\)"):
        loader(replace(config, lanes=3))


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane_and_listed_once(config: DataConfig, tmp_path: Path) -> None:
    good = ids(config, epochs=1)
    keys = damage(config, [good[0]])
    # With one sample a lane and step, the next of the first lane is the first of the second step.
    stands_in = good[GLOBAL_BATCH]

    for _ in range(2):
        one = loader(config, epochs=1, bad_samples=tmp_path / "bad.jsonl")
        try:
            batches = list(one)
            report = one.report()
        finally:
            one.close()
        played = [sample for batch in batches for sample in batch.samples.tolist()]
        assert played == [stands_in, *good[1:]]
        # It looks other than in its own place.
        assert not torch.equal(batches[0].views[0], batches[1].views[0])
        assert (report.expected, report.delivered, report.replaced) == (20, 19, 1)
        assert report.bad_samples == {"checksum": 1}

    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert {entry["key"]} == keys
    assert entry["shard"].startswith(str(config.train))
    assert (entry["reason"], entry["step"]) == ("checksum", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_samples_than_the_budget_stop_the_run(config: DataConfig, workers: int) -> None:
    damage(config, [1, 6, 12])
    one = loader(replace(config, max_bad_fraction=0.1, workers=workers), epochs=4)
    try:
        with pytest.raises(UserError, match=r"more bad samples than data\.max_bad_fraction=0\.1 allows of .* 20; the"):
            list(one)
    finally:
        one.close()


def test_sets_come_as_often_as_their_weights_say_whatever_the_ranks(write_set: WriteSet, config: DataConfig) -> None:
    other = Path(str(config.train)).rename(Path(str(config.train)).with_name("first"))
    second = write_set([9, 12, 30, 10, 8, 16])
    config = replace(config, train=None, sets=(SetConfig(str(other), 3.0), SetConfig(str(second), 1.0)))

    whole = play(config)
    assert play(config, 2) == whole
    assert play(config, start_step=5) == whole[5 * GLOBAL_BATCH :]

    played = ids(config, epochs=8)
    assert len(played) == 8 * (28 // GLOBAL_BATCH) * GLOBAL_BATCH
    of_second = [sample for sample in played if sample >= len(LENGTHS)]
    assert len(of_second) == pytest.approx(len(played) / 4, abs=GLOBAL_BATCH)
    counts = [played.count(sample) for sample in range(len(LENGTHS))]
    assert max(counts) - min(counts) <= 2


def test_train_and_sets_are_given_one_at_a_time() -> None:
    with pytest.raises(ConfigError, match=r"data\.train: missing"):
        DataConfig()
    with pytest.raises(ConfigError, match=r"data\.train: found a beside data\.sets"):
        DataConfig("a", sets=(SetConfig("b"),))


def test_videos_pass_through_shared_memory_unchanged(config: DataConfig) -> None:
    source = VideoSource(config, seed=5, global_batch=GLOBAL_BATCH, rank=0, num_ranks=1)
    videos, _ = source.videos(3)
    room = SharedArrays()
    rest = json.loads(json.dumps(pack(videos, room)))
    maker = BatchMaker(config, GRID, torch.device("cpu"))

    received = unpack(rest, room.arrays(room.places, lambda: None))

    expected, found = (maker.batch(each, source.stand_in)[0] for each in (videos, received))
    assert list(digest(found)) == list(digest(expected))
    assert [video.turn for video in received] == [video.turn for video in videos]
    maker.close()
    source.close()
    room.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_twenty_epochs(config: DataConfig, workers: int) -> None:
    one = loader(replace(config, workers=workers), epochs=22)
    try:
        per_epoch = one.steps_per_epoch
        held = [_held_bytes() for _ in itertools.islice(one, 22 * per_epoch)][1::per_epoch][2:]
    finally:
        one.close()
    assert len(held) == 20
    assert max(held) <= 1.05 * min(held)


def _held_bytes() -> int:
    """Resident bytes of this process and its children."""
    total = 0
    me = str(Path("/proc/self").resolve().name)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        if me in (status.parent.name, fields["PPid"].strip()) and "VmRSS" in fields:
            total += int(fields["VmRSS"].split()[0]) * 1024
    return total


@pytest.mark.slow
def test_no_batch_of_a_mutated_set_is_wrong_unreported(config: DataConfig) -> None:
    config = replace(config, max_bad_fraction=1.0)
    whole = play(config, epochs=1)
    shards = sorted(Path(str(config.train)).glob("*.tar"))
    rng = np.random.default_rng(0)
    num_replaced = 0
    for _ in range(40):
        shard = shards[rng.integers(len(shards))]
        before = shard.read_bytes()
        data = bytearray(before)
        first = int(rng.integers(len(data)))
        size = int(rng.choice([1, 100, 20_000]))
        data[first : first + size] = rng.bytes(len(data[first : first + size]))
        shard.write_bytes(data if rng.random() < 0.7 else data[:first])
        one = loader(config, epochs=1)
        try:
            played = [video for batch in one for video in digest(batch)]
            report = one.report()
        finally:
            one.close()
            shard.write_bytes(before)
        differing = sum(found != expected for found, expected in zip(played, whole, strict=True))
        assert differing == report.replaced == report.expected - report.delivered
        assert bool(report.bad_samples) == bool(differing)
        num_replaced += differing
    assert num_replaced > 20

"""The contents of a run's global batches with different ranks, workers, restarts and damaged samples."""

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
from dataloading.shards.format import read_index, read_manifest
from mcl_dist.batch import TubeletBatch
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.storage.folder import Folder

WriteSet = Callable[..., Path]
Digests = list[bytes]

LENGTHS = [9, 30, 8, 20, 10, 17, 8, 40, 16, 25, 12, 11, 33, 9, 19, 21, 8, 13, 14, 10, 9, 22]
GLOBAL_BATCH = 4
GRID = (1, 7, 7)


@pytest.fixture
def config(write_set: WriteSet) -> DataConfig:
    return DataConfig(str(write_set(LENGTHS)), frames=4, stride=2, crop=28, shuffle_window=2, max_bad_fraction=0.5)


def loader(config: DataConfig, **options: Any) -> TubeletLoader:
    defaults: dict[str, Any] = {"rank": 0, "num_ranks": 1, "seed": 5, "grid": GRID, "global_batch": GLOBAL_BATCH}
    return TubeletLoader(config, device=torch.device("cpu"), **(defaults | options))


def digest(batch: TubeletBatch) -> Iterator[bytes]:
    for parts in zip(*vars(batch).values(), strict=True):
        yield hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).digest()


def digests_of(config: DataConfig, num_ranks: int = 1, **options: Any) -> Digests:
    """Digests of all videos of the global batches in order; checks that every expected sample was delivered."""
    ranks = []
    for rank in range(num_ranks):
        one = loader(config, rank=rank, num_ranks=num_ranks, **{"epochs": 2} | options)
        try:
            ranks.append([list(digest(batch)) for batch in one])
            report = one.report()
            assert report.expected == report.delivered + report.replaced == sum(map(len, ranks[-1]))
        finally:
            one.close()
    return [video for step in zip(*ranks, strict=True) for part in step for video in part]


def sample_ids(config: DataConfig, **options: Any) -> list[int]:
    one = loader(config, **{"epochs": 2} | options)
    try:
        return [sample for batch in one for sample in batch.samples.tolist()]
    finally:
        one.close()


def damage(config: DataConfig, positions: list[int]) -> set[str]:
    """Flip a byte of every still of these samples; returns their keys."""
    folder = Folder(str(config.train))
    keys, first = set(), 0
    for entry in read_manifest(folder).shards:
        index = read_index(folder, entry)
        with Path(str(config.train), entry.name).open("r+b") as file:
            for sample in {position - first for position in positions} & set(range(len(index))):
                keys.add(str(index.keys[sample]))
                for offset, size in index.stills(sample, "frames").tolist():
                    file.seek(offset + size // 2)
                    byte = file.read(1)[0]
                    file.seek(offset + size // 2)
                    file.write(bytes([byte ^ 255]))
        first += len(index)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("bad", [[], [3, 4, 11]])
def test_ranks_workers_and_restarts_do_not_change_two_epochs(config: DataConfig, bad: list[int]) -> None:
    damage(config, bad)
    whole = digests_of(config)

    for num_ranks, workers in ((2, 0), (4, 0), (1, 1), (1, 3), (2, 1)):
        assert digests_of(replace(config, workers=workers), num_ranks) == whole, (num_ranks, workers)
    for step in range(0, 10, 3):
        assert digests_of(config, start_step=step) == whole[step * GLOBAL_BATCH :], step
    half = 5
    before, after = digests_of(config, 2)[: half * GLOBAL_BATCH], digests_of(config, 4, start_step=half)
    assert before + after == whole


@pytest.mark.slow
def test_restarts_at_every_tenth_step_do_not_change_two_epochs(config: DataConfig) -> None:
    config = replace(config, lanes=1)
    whole = digests_of(config, global_batch=1)
    assert len(whole) == 2 * len(LENGTHS)

    for step in range(0, len(whole), 10):
        assert digests_of(config, global_batch=1, start_step=step) == whole[step:]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_no_sample_is_missing_or_repeated_in_an_epoch(config: DataConfig, lanes: int) -> None:
    config = replace(config, lanes=lanes)
    for num_videos, per_epoch in ((GLOBAL_BATCH, 20), (2, 22)):
        if num_videos % lanes == 0:
            delivered = sample_ids(config, global_batch=num_videos)
            for epoch in (delivered[:per_epoch], delivered[per_epoch:]):
                assert len(epoch) == len(set(epoch)) == per_epoch


def test_lanes_that_do_not_divide_the_batch_are_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: found 3, must divide train\.global_batch \(4\)"):
        loader(replace(config, lanes=3))


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane_and_listed_once(config: DataConfig, tmp_path: Path) -> None:
    good = sample_ids(config, epochs=1)
    keys = damage(config, [good[0]])
    # With one sample per lane and step, the next one of the first lane is the first of the second step.
    replacement = good[GLOBAL_BATCH]

    for _ in range(2):
        one = loader(config, epochs=1, bad_samples=tmp_path / "bad.jsonl")
        try:
            batches = list(one)
            report = one.report()
        finally:
            one.close()
        delivered = [sample for batch in batches for sample in batch.samples.tolist()]
        assert delivered == [replacement, *good[1:]]
        # Its draws differ from those in its own slot.
        assert not torch.equal(batches[0].views[0], batches[1].views[0])
        assert (report.expected, report.delivered, report.replaced) == (20, 19, 1)
        assert report.bad_samples == {"checksum": 1}

    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert {entry["key"]} == keys
    assert entry["shard"].startswith(str(config.train))
    assert (entry["reason"], entry["step"]) == ("checksum", 0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_samples_than_the_budget_stop_the_run(config: DataConfig, workers: int) -> None:
    damage(config, [1, 6, 12])
    one = loader(replace(config, max_bad_fraction=0.1, workers=workers), epochs=4)
    try:
        with pytest.raises(UserError, match=r"more bad samples than data\.max_bad_fraction=0\.1 allows of .* 20; the"):
            list(one)
    finally:
        one.close()


@pytest.mark.slow
def test_sets_come_by_their_weights_for_any_number_of_ranks(write_set: WriteSet, config: DataConfig) -> None:
    first = Path(str(config.train)).rename(Path(str(config.train)).with_name("first"))
    second = write_set([9, 12, 30, 10, 8, 16])
    config = replace(config, train=None, sets=(SetConfig(str(first), 3.0), SetConfig(str(second), 1.0)))

    whole = digests_of(config)
    assert digests_of(config, 2) == whole
    assert digests_of(config, start_step=5) == whole[5 * GLOBAL_BATCH :]

    delivered = sample_ids(config, epochs=8)
    assert len(delivered) == 8 * (28 // GLOBAL_BATCH) * GLOBAL_BATCH
    of_second = [sample for sample in delivered if sample >= len(LENGTHS)]
    assert len(of_second) == pytest.approx(len(delivered) / 4, abs=GLOBAL_BATCH)
    counts = [delivered.count(sample) for sample in range(len(LENGTHS))]
    assert max(counts) - min(counts) <= 2


def test_either_train_or_sets_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"data\.train: missing"):
        DataConfig()
    with pytest.raises(ConfigError, match=r"data\.train: found a beside data\.sets"):
        DataConfig("a", sets=(SetConfig("b"),))


def test_videos_pass_through_shared_memory_unchanged(config: DataConfig) -> None:
    source = VideoSource(config, seed=5, global_batch=GLOBAL_BATCH, rank=0, num_ranks=1)
    videos, _ = source.videos(3)
    buffer = SharedArrays()
    fields = json.loads(json.dumps(pack(videos, buffer)))
    maker = BatchMaker(config, GRID, torch.device("cpu"))

    received = unpack(fields, buffer.views(buffer.specs, lambda: None))

    expected, found = (maker.batch(each, source.replacement)[0] for each in (videos, received))
    assert list(digest(found)) == list(digest(expected))
    assert [video.slot for video in received] == [video.slot for video in videos]
    maker.close()
    source.close()
    buffer.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_twenty_epochs(config: DataConfig, workers: int) -> None:
    one = loader(replace(config, workers=workers), epochs=22)
    try:
        per_epoch = one.steps_per_epoch
        resident = [resident_bytes() for _ in itertools.islice(one, 22 * per_epoch)][1::per_epoch][2:]
    finally:
        one.close()
    assert len(resident) == 20
    assert max(resident) <= 1.05 * min(resident)


def resident_bytes() -> int:
    """Resident bytes of this process and its children."""
    total = 0
    own_pid = str(Path("/proc/self").resolve().name)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        if own_pid in (status.parent.name, fields["PPid"].strip()) and "VmRSS" in fields:
            total += int(fields["VmRSS"].split()[0]) * 1024
    return total


@pytest.mark.slow
def test_every_wrong_batch_of_a_mutated_set_is_reported(config: DataConfig) -> None:
    config = replace(config, max_bad_fraction=1.0)
    whole = digests_of(config, epochs=1)
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
            delivered = [video for batch in one for video in digest(batch)]
            report = one.report()
        finally:
            one.close()
            shard.write_bytes(before)
        differing = sum(found != expected for found, expected in zip(delivered, whole, strict=True))
        assert differing == report.replaced == report.expected - report.delivered
        assert bool(report.bad_samples) == bool(differing)
        num_replaced += differing
    assert num_replaced > 20

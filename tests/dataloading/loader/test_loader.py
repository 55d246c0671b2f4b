from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from dataloading.loader import batch_maker as batches_module
from dataloading.loader import loader as loader_module
from dataloading.loader.augment import AugmentConfig
from dataloading.loader.config import DataConfig
from dataloading.loader.loader import TubeletLoader
from dataloading.loader.video_source import VideoSource
from dataloading.shards.format import read_index, read_manifest
from dataloading.shards.index import ShardIndex
from mcl_dist.batch import QUERY, TubeletBatch
from mcl_dist.errors import ConfigError, UserError
from mcl_dist.events import LOADER_STAGES, LoaderReport
from mcl_dist.storage.folder import Folder
from monitoring.metrics.catalogue import METRICS
from tests.support.shard_sets import update_digests

WriteSet = Callable[..., Path]
MakeLoader = Callable[..., TubeletLoader]

# Two are too short for a clip of 4 frames at stride 2, two have exactly one window.
LENGTHS = [9, 30, 8, 20, 10, 5, 17, 8, 40, 16, 7, 25, 12]
NUM_USABLE = 11
GLOBAL_BATCH = 4
PLAIN = AugmentConfig(jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)


@pytest.fixture
def folder(write_set: WriteSet) -> Path:
    return write_set(LENGTHS)


@pytest.fixture
def make_loader(folder: Path) -> Iterator[MakeLoader]:
    loaders = []

    def make(augment: AugmentConfig | None = None, **options: Any) -> TubeletLoader:
        config = DataConfig(
            str(folder), frames=4, stride=2, crop=28, augment=augment or AugmentConfig(), shuffle_window=2
        )
        config = replace(config, **options.pop("config", {}))
        defaults = {"rank": 0, "num_ranks": 1, "seed": 5, "grid": (1, 7, 7), "global_batch": GLOBAL_BATCH}
        made = TubeletLoader(config, **({"device": torch.device("cpu")} | defaults | options))
        loaders.append(made)
        return made

    yield make
    for one in loaders:
        one.close()


def first_batches(loader: TubeletLoader, count: int) -> list[TubeletBatch]:
    return list(itertools.islice(loader, count))


def assert_equal(batch: TubeletBatch, other: TubeletBatch) -> None:
    for name, values in vars(batch).items():
        assert torch.equal(values, getattr(other, name)), name


def concatenate(batches: tuple[TubeletBatch, ...]) -> TubeletBatch:
    return TubeletBatch(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in batches), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_batches_decoded_on_a_cpu_are_copied_to_the_device(make_loader: MakeLoader, device: str, workers: int) -> None:
    config = {"decode_on": "cpu", "workers": workers}
    here = first_batches(make_loader(), 2)
    for batch, other in zip(
        first_batches(make_loader(device=torch.device(device), config=config), 2), here, strict=True
    ):
        assert {part.device for part in vars(batch).values()} == {torch.device(device)}
        assert {name: part.shape for name, part in vars(batch).items()} == {k: v.shape for k, v in vars(other).items()}
        if device != "meta":  # a meta tensor has no values
            assert_equal(batch.to(torch.device("cpu")), other)


@pytest.mark.gpu
def test_augmentation_on_a_gpu_stays_in_the_stream_of_its_batch(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = set()

    def record_stream(*_: object) -> None:
        streams.add(torch.cuda.current_stream().cuda_stream)

    monkeypatch.setattr("dataloading.loader.batch_maker.augment", record_stream)
    first_batches(make_loader(device=torch.device("cuda:0"), config={"threads": 2}), 1)
    assert len(streams) == 1
    assert torch.cuda.default_stream().cuda_stream not in streams


def test_a_batch_has_the_shapes_and_types_of_its_contract(make_loader: MakeLoader) -> None:
    (batch,) = first_batches(make_loader(), 1)

    assert (batch.views.shape, batch.views.dtype) == ((4, 4, 4, 28, 28, 3), torch.uint8)
    assert (batch.motion.shape, batch.motion.dtype) == ((4, 1, 7, 7), torch.float32)
    assert (batch.order.shape, batch.order.dtype) == ((4,), torch.int64)
    assert (batch.samples.shape, batch.samples.dtype) == ((4,), torch.int64)
    assert (batch.boxes.shape, batch.boxes.dtype) == ((4, 4, 4), torch.float32)
    assert set(batch.order.tolist()) <= {0, 1}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(make_loader: MakeLoader, num_ranks: int) -> None:
    alone = first_batches(make_loader(), 5)

    ranks = [first_batches(make_loader(rank=rank, num_ranks=num_ranks), 5) for rank in range(num_ranks)]

    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert_equal(concatenate(parts), whole)


@pytest.mark.parametrize("start_step", [1, 2, 5])
def test_a_restart_continues_with_the_same_batches(make_loader: MakeLoader, start_step: int) -> None:
    uninterrupted = first_batches(make_loader(), start_step + 3)

    restarted = first_batches(make_loader(start_step=start_step), 3)

    for batch, expected in zip(restarted, uninterrupted[start_step:], strict=True):
        assert_equal(batch, expected)


def test_threads_and_prefetching_do_not_change_the_batches(make_loader: MakeLoader) -> None:
    default = first_batches(make_loader(), 3)

    other = first_batches(make_loader(config={"threads": 3, "prefetch": 1}), 3)

    for batch, expected in zip(other, default, strict=True):
        assert_equal(batch, expected)


def test_another_seed_gives_other_batches(make_loader: MakeLoader) -> None:
    (one,), (other,) = first_batches(make_loader(), 1), first_batches(make_loader(seed=6), 1)

    assert not torch.equal(one.views, other.views)


def test_another_epoch_draws_anew(make_loader: MakeLoader) -> None:
    batches = first_batches(make_loader(), 10)

    views_by_sample: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for sample, views in zip(batch.samples.tolist(), batch.views, strict=True):
            views_by_sample.setdefault(sample, []).append(views)
    again = [views for views in views_by_sample.values() if len(views) > 1]
    assert again
    assert not any(torch.equal(views[0], views[1]) for views in again)


def test_a_sample_comes_at_most_once_an_epoch_and_all_samples_come(make_loader: MakeLoader) -> None:
    loader = make_loader()
    assert loader.steps_per_epoch == NUM_USABLE // GLOBAL_BATCH

    samples = torch.stack([batch.samples for batch in first_batches(loader, 8)]).view(4, -1)

    assert all(len(set(epoch)) == len(epoch) for epoch in samples.tolist())
    usable = {position for position, length in enumerate(LENGTHS) if length >= 8}
    assert set(samples.flatten().tolist()) == usable


def test_videos_with_too_few_windows_are_left_out_and_counted(make_loader: MakeLoader) -> None:
    assert make_loader().num_left_out == 2
    assert make_loader(config={"min_windows": 2}).num_left_out == 7


def captured_flow(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The flow from which the targets are computed, one tensor per batch."""
    seen = []

    def target(flow: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        seen.append(flow)
        return torch.zeros(len(flow), *grid)

    monkeypatch.setattr(batches_module, "motion_target", target)
    return seen


@pytest.mark.parametrize("mirror_probability", [0.0, 1.0])
def test_pixels_and_flow_of_the_query_share_frames_crop_and_mirror(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, mirror_probability: float
) -> None:
    seen = captured_flow(monkeypatch)
    augment = replace(PLAIN, mirror_probability=mirror_probability)

    batches = first_batches(make_loader(augment), 4)

    for batch, flow in zip(batches, seen, strict=False):
        pixels = batch.views[:, QUERY, ..., 0].float()
        # The flow is not mirrored, only its target.
        pixels = pixels.flip(-1) if mirror_probability else pixels
        for component in flow.float().unbind(-1):
            # The flow has half the size, so resizing changes its bytes; at other places the difference would be 60.
            assert (pixels - component).abs().mean() < 6
            assert (pixels.flip(-1) - component).abs().mean() > 20


@pytest.mark.slow
def test_the_target_of_a_mirrored_query_is_the_mirrored_target(make_loader: MakeLoader) -> None:
    straight = first_batches(make_loader(replace(PLAIN, mirror_probability=0.0)), 4)

    mirrored = first_batches(make_loader(replace(PLAIN, mirror_probability=1.0)), 4)

    for one, other in zip(straight, mirrored, strict=True):
        assert torch.equal(one.views.flip(-2), other.views)
        torch.testing.assert_close(one.motion.flip(-1), other.motion)


def test_a_batch_that_the_ranks_do_not_divide_is_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch\): found 4, must be a multiple"):
        make_loader(num_ranks=3)


def test_a_set_with_fewer_usable_videos_than_the_batch_is_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(UserError, match="11 usable videos are fewer than the 12 of a global batch"):
        make_loader(global_batch=12)


@pytest.mark.parametrize(
    ("grid", "found"),
    [((3, 7, 7), r"data\.frames: found 4, .* encoder's 3"), ((1, 6, 6), r"data\.crop: found 28, .* encoder's 6")],
)
def test_a_grid_that_does_not_divide_the_clip_is_refused(
    make_loader: MakeLoader, grid: tuple[int, int, int], found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        make_loader(grid=grid)


def test_a_blur_wider_than_a_view_is_refused(make_loader: MakeLoader) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.blur_sigma: found 10.0, too wide"):
        make_loader(replace(PLAIN, blur_sigma=(0.1, 10.0)))


def test_the_error_for_scores_of_another_window_names_the_build_option(make_loader: MakeLoader) -> None:
    with pytest.raises(UserError, match=r"windows of 8 frames, .* is 4; build the set with .* --window 4"):
        first_batches(make_loader(config={"stride": 1}), 1)


def shards_of(folder: Path) -> Iterator[tuple[BinaryIO, ShardIndex]]:
    """Each shard of a set, open for writing, with its index."""
    store = Folder(str(folder))
    for entry in read_manifest(store).shards:
        with (folder / entry.name).open("r+b") as file:
            yield file, read_index(store, entry)


def test_a_damaged_still_raises_in_the_consumer(folder: Path, make_loader: MakeLoader) -> None:
    for file, index in shards_of(folder):
        for offset, _ in index.frame_stills.tolist():
            file.seek(offset)
            file.write(b"no")

    with pytest.raises(UserError, match=r"video video-\d+: frames still \d+ does not match its checksum"):
        first_batches(make_loader(), 1)


def test_the_error_for_stills_that_only_the_decoder_refuses_names_the_video(
    folder: Path, make_loader: MakeLoader
) -> None:
    for file, index in shards_of(folder):
        for offset, size in index.frame_stills.tolist():
            file.seek(offset + 2)
            header = file.read(size - 4)
            # A Huffman table of an unknown kind; size, start and end of the still are unchanged.
            file.seek(offset + 2 + header.index(b"\xff\xc4") + 4)
            file.write(b"\xff" * 8)

    update_digests(folder)
    with pytest.raises(UserError, match=r"more bad samples .*video video-\d+: DALI cannot decode a still .*; run `mcl"):
        first_batches(make_loader(), 1)


def test_closing_an_unread_loader_leaves_no_thread(make_loader: MakeLoader) -> None:
    before = threading.active_count()

    make_loader().close()

    assert threading.active_count() == before


def test_draws_of_a_sample_do_not_depend_on_its_neighbours(make_loader: MakeLoader) -> None:
    by_sample: list[dict[int, np.ndarray]] = []
    for batch_size in (4, 11):
        batches = first_batches(make_loader(global_batch=batch_size), NUM_USABLE // batch_size)
        by_sample.append(
            {
                sample: views.numpy()
                for batch in batches
                for sample, views in zip(batch.samples.tolist(), batch.views, strict=True)
            }
        )

    few, all_of_them = by_sample
    assert all(np.array_equal(views, all_of_them[sample]) for sample, views in few.items())


def test_counts_of_reads_are_reported_while_no_batch_arrives(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "REPORT_SECONDS", 0.01)
    counters: dict[str, Any] = {"retries": {"busy": 0}}
    is_reported = threading.Event()

    def videos(source: VideoSource, step: int) -> Any:
        counters["retries"]["busy"] = 3
        assert is_reported.wait(10)
        return read(source, step)

    def listen(report: LoaderReport) -> None:
        if report.storage["retries"] == {"busy": 3}:
            is_reported.set()

    read = VideoSource.videos
    monkeypatch.setattr(VideoSource, "videos", videos)
    monkeypatch.setattr(VideoSource, "counters", lambda _source: counters)
    (batch,) = first_batches(make_loader(listen=listen), 1)
    assert len(batch.samples) == GLOBAL_BATCH


def test_the_report_has_the_stages_that_the_metrics_export(make_loader: MakeLoader) -> None:
    loader = make_loader()
    first_batches(loader, 1)

    assert (
        set(loader.report().stages) == set(LOADER_STAGES) == set(METRICS["mcl_loader_stage_cpu_seconds_total"].values)
    )

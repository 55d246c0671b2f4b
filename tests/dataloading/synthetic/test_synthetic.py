from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from dataloading.synthetic.scenes import DEMO_FRAMES, DEMO_SIZE, MOVING_FRAMES, SCENES, render_alike, render_distracting
from dataloading.synthetic.videos import write_synthetic

CLASSES = SCENES["demo"].classes


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, seed=3, train_per_class=2, test_per_class=1, processes=1)
    return folder


def decode_grey(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_every_class_folder_has_the_requested_number_of_videos(small_set: Path) -> None:
    for split, per_class in (("train", 2), ("test", 1)):
        found = {folder.name: len(list(folder.glob("*.mp4"))) for folder in (small_set / split).iterdir()}
        assert found == dict.fromkeys(CLASSES, per_class)


def test_a_file_decodes_to_nearly_the_rendered_frames(small_set: Path) -> None:
    rendered = render_alike(CLASSES[0], np.random.default_rng((3, 0, 0, 1)))
    decoded = decode_grey(small_set / "train" / CLASSES[0] / "0001.mp4")
    assert decoded.shape == rendered.shape == (DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE)
    assert np.abs(decoded.astype(int) - rendered).mean() < 3


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes_and_other_seeds_other_bytes(small_set: Path, tmp_path: Path) -> None:
    name = Path("test") / CLASSES[5] / "0000.mp4"
    for seed in (3, 4):
        write_synthetic(tmp_path / str(seed), seed=seed, train_per_class=0, test_per_class=1, processes=1)
    assert (tmp_path / "3" / name).read_bytes() == (small_set / name).read_bytes()
    assert (tmp_path / "4" / name).read_bytes() != (small_set / name).read_bytes()


def test_train_and_test_share_no_video(small_set: Path) -> None:
    train, test = (small_set / split / CLASSES[0] / "0000.mp4" for split in ("train", "test"))
    assert not np.array_equal(decode_grey(train), decode_grey(test))


@pytest.mark.parametrize("motion", ["across", "spin", "pulse"])
def test_the_fast_period_changes_more_from_frame_to_frame_than_the_slow(motion: str) -> None:
    change = {}
    for speed in ("slow", "fast"):
        frames = render_alike(f"{motion}_{speed}", np.random.default_rng(0)).astype(int)
        change[speed] = np.abs(np.diff(frames, axis=0)).mean()
    assert change["fast"] > 1.3 * change["slow"]


def test_single_frames_of_two_motions_look_alike() -> None:
    # Both show a round disc with vertical stripes, so the mean contrast must agree.
    contrast = [
        np.mean([render_alike(name, np.random.default_rng(n))[0].std() for n in range(12)])
        for name in ("across_slow", "orbit_fast")
    ]
    assert contrast[0] == pytest.approx(contrast[1], rel=0.1)


def test_the_disc_of_a_distracting_video_moves_only_for_a_while_in_each_half() -> None:
    frames = render_distracting("across_fast", np.random.default_rng(0)).astype(int)
    change = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3))  # the disc changes pixels more than the drift
    moving = change > 100
    halves = moving[: len(frames) // 2], moving[len(frames) // 2 :]
    for half in halves:
        assert 0.5 * MOVING_FRAMES < half.sum() <= MOVING_FRAMES


def test_distracting_videos_of_a_class_have_different_backgrounds() -> None:
    first, second = (render_distracting("spin_slow", np.random.default_rng(seed))[0].astype(int) for seed in (0, 1))
    assert np.abs(first - second).mean() > 20

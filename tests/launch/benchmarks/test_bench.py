from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataloading.synthetic.videos import write_video
from launch.benchmarks.flow import box_overlap, map_correlation
from launch.cli.main import main


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataloading.synthetic.videos import write_synthetic

    folder = tmp_path_factory.mktemp("bench")
    write_synthetic(folder, seed=0, train_per_class=1, test_per_class=0)
    for class_folder in sorted((folder / "train").iterdir())[2:]:
        for file in class_folder.iterdir():
            file.unlink()
    return folder / "train"


@pytest.mark.slow
def test_every_estimator_is_compared_with_the_reference(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "flow", "--videos", str(videos), "--groups", "1", "--short-side", "0", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in results] == ["tvl1", "opencv-tvl1", "dis"]
    for each in results:
        assert each["videos"] == 2
        assert each["flows"] == 8
        assert each["ms_per_frame"] > 0
        assert each["cpu_ratio"] == pytest.approx(each["reference_ms_per_frame"] / each["ms_per_frame"])
        assert each["agreement"] > 0.3  # on videos of 56 pixels
        assert each["frames_per_second"] > 0
        assert 0 <= each["box_iou"] <= 1


def test_a_missing_device_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "flow", "--device", "cuda:99"]) == 2
    assert "--device: found 'cuda:99'" in capsys.readouterr().err


def test_a_folder_without_usable_videos_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "broken.mp4").write_bytes(b"no video")
    assert main(["bench", "flow", "--videos", str(tmp_path)]) == 1
    assert "no usable video" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["tvl1", "dis"])
def test_the_stages_of_a_build_add_up(videos: Path, capsys: pytest.CaptureFixture[str], flow: str) -> None:
    video = next(videos.glob("*/*"))
    assert main(["bench", "build", "--video", str(video), "--flow", flow, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["stages"]) == ["decode", "resize", "flow", "motion", "encode", "other"]
    assert min(report["stages"].values()) >= -1e-6
    assert sum(report["stages"].values()) == pytest.approx(report["cpu_seconds"])
    assert report["frames"] == 72
    assert report["peak_rss_bytes"] > 2**20


@pytest.mark.slow
def test_memory_grows_with_a_videos_length_only_by_its_stills(tmp_path: Path) -> None:
    # Keeping the 80 additional frames of 1920 by 1080 would take 500 MB, or 250 MB in the decoder's format.
    for name, num_frames in (("short", 40), ("long", 120)):
        write_video(tmp_path / f"{name}.mp4", np.broadcast_to(np.uint8(90), (num_frames, 1080, 1920)))
    code = f"""
from pathlib import Path
from launch.benchmarks.build import measure_build
for name in ("short", "long"):
    print(measure_build(Path({str(tmp_path)!r}) / f"{{name}}.mp4", "dis")["peak_rss_bytes"])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    short, long = map(int, output.split())
    assert long - short < 50e6


def test_a_broken_video_or_an_unknown_estimator_fails_in_one_line(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert main(["bench", "build", "--video", str(broken)]) == 1
    assert "refused" in capsys.readouterr().err
    assert main(["bench", "build", "--video", str(next(videos.glob("*/*"))), "--flow", "tvl2"]) == 2
    assert "flow" in capsys.readouterr().err


def test_box_overlap_is_intersection_over_union() -> None:
    maps = np.zeros((2, 7, 7))
    maps[0, 0:2, 0:2] = maps[1, 0:2, 1:3] = 1
    assert box_overlap(maps[0], maps[0]) == 1.0
    assert box_overlap(*maps) == pytest.approx(2 / 6)


def test_a_flat_map_correlates_only_with_a_flat_map() -> None:
    moving = np.random.default_rng(0).random((1, 7, 7))
    flat = np.zeros((1, 7, 7))
    assert map_correlation(flat, flat) == 1.0
    assert map_correlation(flat, moving) == 0.0
    assert map_correlation(2 * moving + 1, moving) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_variant_of_the_negatives_gives_one_loss(capsys: pytest.CaptureFixture[str], world_size: int) -> None:
    size, batch = 60001, 64
    options = ["--queue", size, "--batch", batch, "--dim", 8, "--world-size", world_size, "--json"]
    assert main(["bench", "negatives", *map(str, options)]) == 0
    naive, *others = json.loads(capsys.readouterr().out)
    assert [naive["name"], *(each["name"] for each in others)] == ["naive", "chunked", "sharded", "fused"]
    assert naive["peak_bytes"] > 2 * 4 * size * batch  # logits and their gradient
    for each in others:
        assert each["ms"] > 0
        assert each["loss"] == pytest.approx(naive["loss"], abs=1e-6)
        assert each["peak_bytes"] < naive["peak_bytes"]


def test_a_queue_smaller_than_the_number_of_ranks_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "negatives", "--queue", "3", "--world-size", "4"]) == 2
    assert "--queue: found 3, must be at least 4" in capsys.readouterr().err


@pytest.mark.slow
def test_exporting_costs_a_step_of_the_demo_less_than_half_a_percent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "exporter", "--steps", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scrape_share_ms = report["scrape_ms"] * report["step_ms"] / 15_000
    overhead = (report["listener_us"] / 1e3 + scrape_share_ms) / report["step_cpu_ms"]
    assert report["overhead"] == pytest.approx(overhead)
    assert 0 < report["listener_us"] / 1e3 < report["scrape_ms"]
    assert report["wall_ratio"] > 0
    assert report["overhead"] < 0.005

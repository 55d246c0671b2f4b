from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli.demo import CONFIG, MARKER
from launch.cli.main import main
from launch.report.tubelet_picture import save_tubelet_picture
from launch.run.config import PretrainConfig, check
from mcl_dist.config import load_config


@pytest.fixture(autouse=True)
def kept_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo hides the GPUs from its process; restore them for other tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _write_fewer_videos(monkeypatch)
    folder = tmp_path / "demo"
    for attempt in range(2):
        assert main(["demo", "--dir", str(folder), "--steps", "2"]) == 0
        output = capfd.readouterr().out
        assert (f"emptying {folder}" in output) == (attempt == 1)
        for text in (
            "chance",
            "untrained",
            "pretrained",
            str(folder / "tubelets.png"),
            str(folder / "pretrain" / "report.html"),
        ):
            assert text in output
    summary = json.loads((folder / "summary.json").read_text())
    assert "Not here" not in (folder / "pretrain" / "report.html").read_text()
    assert summary["chance"] == 1 / 16
    assert 0 <= summary["untrained"] <= 1
    assert 0 <= summary["pretrained"] <= 1
    assert summary["seconds"] == pytest.approx(sum(summary["stages"].values()))


def _write_fewer_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write three videos per class instead of sixty."""
    from dataloading.synthetic import videos as synthetic

    def write_few(folder: Path, *, seed: int, processes: int) -> int:
        return original(folder, seed=seed, train_per_class=2, test_per_class=1, processes=processes)

    original = synthetic.write_synthetic
    monkeypatch.setattr(synthetic, "write_synthetic", write_few)


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "videos" / "holiday.mp4"
    precious.parent.mkdir()
    precious.write_bytes(b"irreplaceable")
    assert main(["demo", "--dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    assert precious.read_bytes() == b"irreplaceable"
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--steps", "0")])
def test_a_wrong_option_is_reported_before_the_folder_of_an_earlier_demo_is_emptied(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (MARKER, "summary.json"):
        (tmp_path / name).touch()
    assert main(["demo", "--dir", str(tmp_path), *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "summary.json").exists()


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--dir", str(tmp_path / "file" / "demo")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_configuration_of_the_demo_suits_its_ranks() -> None:
    check(load_config(PretrainConfig, CONFIG), 2)


@pytest.mark.slow
def test_the_picture_is_a_png(synthetic_shards: Path, tmp_path: Path) -> None:
    from dataloading.reading.shard_set import ShardSet

    config = load_config(PretrainConfig, CONFIG)
    path = tmp_path / "tubelets.png"
    save_tubelet_picture(path, ShardSet(str(synthetic_shards)), 3, config.data, seed=0)
    assert path.read_bytes().startswith(b"\x89PNG")

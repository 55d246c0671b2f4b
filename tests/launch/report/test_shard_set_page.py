from __future__ import annotations

import re
import tempfile
from html import escape
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from dataloading.reading.shard_set import ShardSet
from dataloading.synthetic.videos import write_video
from dataloading.visualize import inspect_video, sample_positions
from launch.cli.main import main
from launch.report.shard_set_page import shard_set_page
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE
from tests.support.browser import Elements, chromium

CLASS = "<script>document.title='taken'<"  # a folder name cannot contain a slash
VIDEO = '"><img src=x onerror=alert(1)>.mp4'
BROKEN = "<b>&amp; 'broken'.mp4"
BUILD_OPTIONS = ("--flow", "dis", "--short-side", "0", "--window", "8", "--workers", "1")
CROP_COLOUR = (0x00, 0xD8, 0xFF)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with hostile names: two stored videos and a refused one."""
    folder = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(2)
    for name in (CLASS, "plain"):
        (folder / "videos" / name).mkdir(parents=True)
        write_video(folder / "videos" / name / VIDEO, rng.integers(0, 256, (30, 48, 64), dtype=np.uint8))
    (folder / "videos" / "plain" / BROKEN).write_bytes(b"no video")
    assert main(["shards", "build", str(folder / "videos"), str(folder / "set"), *BUILD_OPTIONS]) == 0
    return folder / "set"


@pytest.fixture(scope="module")
def written(shards: Path) -> Path:
    out = shards.parent / "pages" / "page.html"
    assert main(["shards", "inspect", str(shards), "--out", str(out), "--seed", "4"]) == 0
    return out


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return written.read_text()


def test_the_path_is_printed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["shards", "inspect", str(shards), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.stat().st_size < 1_000_000


def test_the_page_shows_the_facts_of_the_set(html: str) -> None:
    for name, value in (("videos", "2"), ("frames", "60"), ("flow", "dis"), ("window", "8"), ("refused", "1")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html
    assert "<dt>playing time</dt><dd>0:00:02</dd>" in html
    assert "<summary>unreadable: 1</summary>" in html
    assert "2 of 2 videos, drawn with seed 4" in html


def test_a_video_has_its_facts_and_images(html: str) -> None:
    assert "30 frames at 25 frames/s, 1.2 s" in html
    assert "<dt>flow</dt><dd>dis, 64×48</dd>" in html
    for part in ("frame 0", "flow of frame 29", "frame map of frame 29", "clip scores", "query, frame", "crop"):
        assert part in html


def test_names_and_reasons_are_escaped(html: str) -> None:
    elements = Elements(html).found
    assert "script" not in {tag for tag, _ in elements}
    assert not [attributes for _, attributes in elements if any(name.startswith("on") for name in attributes)]
    for name in (CLASS, VIDEO, BROKEN):
        assert escape(name) in html
        assert name not in html


def test_nothing_is_loaded_from_outside_the_page(html: str) -> None:
    assert "http://" not in html
    assert "https://" not in html
    links = [
        attributes[name] or ""
        for _, attributes in Elements(html).found
        for name in attributes
        if name in ("src", "href")
    ]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert all(link.startswith("data:image/") for link in re.findall(r"url\(([^)]*)\)", html))


def test_every_internal_reference_resolves_to_one_element(html: str) -> None:
    elements = Elements(html).found
    names = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {(attributes["href"] or "")[1:] for tag, attributes in elements if tag == "use"} <= set(names)


def test_equal_seeds_give_equal_pages_and_different_seeds_do_not(written: Path, shards: Path, tmp_path: Path) -> None:
    pages = []
    for seed in ("4", "5"):
        assert main(["shards", "inspect", str(shards), "--out", str(tmp_path / seed), "--seed", seed]) == 0
        pages.append((tmp_path / seed).read_bytes())
    assert pages[0] == written.read_bytes() != pages[1]


def test_marked_starts_are_those_of_the_tubelets(html: str, shards: Path) -> None:
    shard_set = ShardSet(str(shards))
    starts = []
    for position in sample_positions(2, 6, seed=4):
        query, _, second, third = inspect_video(shard_set, position, seed=4).views
        starts += [int(view.tubelet.frames[0]) for view in (query, second, third)]
    marked = [attributes["data-start"] for _, attributes in Elements(html).found if "data-start" in attributes]
    assert marked == [str(start) for start in starts]


def test_drawn_boxes_are_the_crops(html: str, shards: Path) -> None:
    shard_set = ShardSet(str(shards))
    boxes = [
        view.tubelet.box
        for position in sample_positions(2, 6, seed=4)
        for view in inspect_video(shard_set, position, seed=4).views
        for _ in view.frame_images
    ]
    drawn = [attributes for _, attributes in Elements(html).found if attributes.get("class") == "box"]
    sides = [tuple(int(box[side] or 0) for side in ("y", "x", "height", "width")) for box in drawn]
    assert sides == [tuple(box) for box in boxes]


def test_credentials_of_a_url_stay_out_of_the_page(shards: Path) -> None:
    assert "canary" not in shard_set_page("s3://user:canary@store/set", ShardSet(str(shards)), [], seed=0)


def test_a_remote_set_is_fetched_and_not_kept(
    shards: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").put(str(shards), "/inspected", recursive=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "page.html"
    assert main(["shards", "inspect", "memory://inspected", "--out", str(out), "--seed", "4"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert out.read_text().replace("memory://inspected", str(shards)) == written.read_text()


def test_a_missing_set_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "inspect", str(tmp_path), "--out", str(tmp_path / "page.html")]) == EXIT_FAILURE
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["file/page.html", "folder", "."])
def test_an_unwritable_page_is_reported_in_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "inspect", str(shards), "--out", out, "--videos", "1"]) == EXIT_FAILURE
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(("option", "value"), [("--videos", "0"), ("--seed", "-1")])
def test_a_number_out_of_range_is_a_usage_error(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    arguments = ["shards", "inspect", str(shards), "--out", str(tmp_path / "page.html"), option, value]
    assert main(arguments) == EXIT_USAGE
    assert f"{option}: found {value}, must be at least" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [0, 1])
def test_a_browser_draws_the_page_without_errors(written: Path, tmp_path: Path, scheme: int) -> None:
    screenshot = tmp_path / "page.png"
    scheme_option = f"--blink-settings=preferredColorScheme={scheme}"  # 0 is dark, 1 light
    result = chromium(tmp_path, written.as_uri(), f"--screenshot={screenshot}", scheme_option)
    assert "CONSOLE" not in result.stderr
    drawn = cv2.cvtColor(cv2.imread(str(screenshot)), cv2.COLOR_BGR2RGB)
    assert (drawn.mean(axis=2) < 60).mean() > 0.5 if scheme == 0 else (drawn.mean(axis=2) > 200).mean() > 0.5
    # Crop boxes and images are drawn: many more colours than those of the page.
    assert (drawn == CROP_COLOUR).all(axis=2).sum() > 500
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 5000


@pytest.mark.slow
def test_a_browser_executes_no_script_from_names(written: Path, tmp_path: Path) -> None:
    dom = chromium(tmp_path, written.as_uri(), "--dump-dom").stdout
    assert "<title>Shard set" in dom
    assert "taken</title>" not in dom

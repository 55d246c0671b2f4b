from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dataloading.synthetic.videos import write_video
from launch.cli.main import main
from launch.cli.shards import BuildProgress
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE

OPTIONS = ("--flow", "dis", "--short-side", "0", "--window", "8", "--workers", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One good video, one too short, one broken, and a file that is no video."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    for name, num_frames in (("good", 12), ("short", 7)):
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (num_frames, 48, 64), dtype=np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("no video either")
    return folder.parent


def build(source: Path, destination: Path, *more: str) -> int:
    return main(["shards", "build", str(source), str(destination), *OPTIONS, *more])


def test_a_build_tells_each_refusal_and_closes_with_a_table(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, tmp_path / "set") == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"{source}: 1 files are not videos by their extension, left out",
        "a/broken.mp4: refused, unreadable: Invalid data found when processing input; "
        "replace the file, it is no video or was cut off",
        "a/short.mp4: refused, too short: 7 frames, a window has 8; leave it out or give a smaller --window",
    ]
    table = dict(line.rsplit(maxsplit=1) for line in told.out.splitlines())
    assert table["videos"] == "1"
    assert table["refused, too short"] == "1"


def test_a_build_reports_to_machines(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(source, tmp_path / "set", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["videos"], report["frames"], report["shards"]) == (1, 12, 1)
    assert report["refused"] == {"too short": 1, "unreadable": 1}


def test_building_the_same_again_does_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(source, tmp_path / "set") == 0
    before = (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns
    assert build(source, tmp_path / "set") == 0
    assert "complete already" in capsys.readouterr().err
    assert (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns == before


def test_building_otherwise_over_a_complete_set_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, tmp_path / "set") == 0
    capsys.readouterr()
    assert build(source, tmp_path / "set", "--quality", "50") == EXIT_FAILURE
    assert "built with another quality" in capsys.readouterr().err.splitlines()[-1]


def test_the_flow_has_the_size_asked_for_and_the_set_says_so(source: Path, tmp_path: Path) -> None:
    assert build(source, tmp_path / "half", "--flow-size", "0.5") == 0
    assert build(source, tmp_path / "whole") == 0
    builds = [json.loads((tmp_path / name / "manifest.json").read_bytes())["build"] for name in ("half", "whole")]
    assert [build["flow_size"] for build in builds] == [0.5, 1.0]
    with tarfile.open(tmp_path / "half" / "shard-000000.tar") as tar:
        (member,) = (each for each in tar if each.name.endswith(".json"))
        info = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
    assert (info["flow_height"], info["flow_width"]) == (24, 32)
    assert build(source, tmp_path / "half") == EXIT_FAILURE


def test_a_missing_source_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tmp_path / "none", tmp_path / "set") == EXIT_FAILURE
    told = capsys.readouterr().err
    assert told == f"mcl: {tmp_path}/none: no such file or folder; check the path\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--flow", "tvl2", "--flow: found 'tvl2'; did you mean `tvl1`?"),
        ("--flow", "opencv_tvl", "--flow: found 'opencv_tvl'; did you mean"),
        ("--quality", "101", "--quality: found 101, must be a whole number at least 1 and at most 100"),
        ("--short-side", "-1", "--short-side: found -1"),
        ("--keep-every", "3", "--keep-every: found 3, must divide the window, 8 frames"),
        ("--workers", "0", "--workers: found 0, must be at least 1"),
        ("--flow-size", "1.5", "--flow-size: found 1.5, must be a number at least 0.25 and at most 1.0"),
        ("--device", "cuda", "--device: found cuda with flow dis, only tvl1 computes on a GPU"),
        ("--executor", "slurm", "--executor: found 'slurm', must be local or ray"),
        ("--address", "head:6379", "--address: found 'head:6379' without --executor ray"),
        ("--retry-seconds", "-1", "--retry-seconds: found -1.0, must be at least 0"),
    ],
)
def test_an_option_out_of_range_is_wrong_usage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert build(source, tmp_path / "set", option, value) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_sound_set_verifies(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(source, tmp_path / "set")
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "set"), "--json"]) == 0
    size = (tmp_path / "set" / "shard-000000.tar").stat().st_size
    assert json.loads(capsys.readouterr().out) == {"videos": 1, "shards": 1, "bytes": size, "problems": []}


def test_a_damaged_set_fails_with_a_line_a_problem(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(source, tmp_path / "set")
    (tmp_path / "set" / "stray").touch()
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "set"), "--json"]) == EXIT_FAILURE
    told = capsys.readouterr()
    problem = f"{tmp_path}/set/stray: the manifest does not name it; remove it"
    assert json.loads(told.out)["problems"] == [problem]
    assert told.err == f"{problem}\n"


def test_a_folder_that_is_no_set_fails_for_machines_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", str(tmp_path), "--json"]) == EXIT_FAILURE
    told = capsys.readouterr()
    assert json.loads(told.out)["videos"] == 0
    assert "manifest.json: missing" in json.loads(told.out)["problems"][0]
    assert told.err.count("\n") == 1


def test_a_person_watching_sees_one_line_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataloading.shards.format import RefusedVideo

    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = BuildProgress(total=2)
        progress(RefusedVideo("a/x.mp4", "too short: 3 frames"))
        progress.close()
    pieces = []
    with suppress(OSError):  # a terminal's end, once the other side is closed and all is read
        while piece := os.read(leader, 4096):
            pieces.append(piece)
    os.close(leader)
    told = b"".join(pieces).decode()
    assert "a/x.mp4: refused, too short: 3 frames" in told
    line = r"\r\033\[K1 of 2 videos, 1 refused, \d+\.\d+ videos/s, 0\.0 MB/s, about 0 s left\r\033\[K"
    assert re.search(line, told)


@pytest.mark.slow
def test_ctrl_c_leaves_no_worker_and_nothing_half_written(source: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_video(source / "a" / f"{number}.mp4", np.zeros((2000, 96, 128), dtype=np.uint8))
    command = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "shards",
        "build",
        source,
        tmp_path / "set",
        "--short-side",
        "0",
    ]
    # With this seed the broken video comes first, so its refusal says that work has begun.
    command += ["--window", "8", "--workers", "2", "--seed", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while "refused" not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    # The workers hold the pipe too: its end means that they have all left.
    told = process.communicate(timeout=60)[1]
    assert told.splitlines()[-1] == "mcl: interrupted"
    assert not (tmp_path / "set").exists()


def test_a_listed_video_that_is_missing_is_counted_as_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text(
        "label,youtube_id,time_start,time_end,split\na,good,1,11,train\na,gone,1,11,train\nb,broken,1,11,test\n"
    )
    assert build(source, tmp_path / "set", "--list", str(tmp_path / "list.csv"), "--split", "train", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["refused"] == {"missing": 1}
    assert json.loads((tmp_path / "set" / "manifest.json").read_bytes())["classes"] == ["a", "b"]
    assert "gone_000001_000011: refused, missing: no such file below SRC" in told.err


@pytest.mark.parametrize(
    "options",
    [
        ["--split", "train"],
        ["--fold", "2"],
        ["--classes", "x"],
        ["--list", "x", "--split", "dev"],
        ["--list-format", "csv"],
    ],
)
def test_list_options_that_make_no_sense_are_wrong_usage(source: Path, tmp_path: Path, options: list[str]) -> None:
    assert build(source, tmp_path / "set", *options) == EXIT_USAGE


def test_duplicates_are_told_and_left_out_on_demand(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "b").mkdir()
    (source / "b" / "copy.mp4").write_bytes((source / "a" / "good.mp4").read_bytes())
    assert build(source, tmp_path / "both", "--json") == 0
    told = capsys.readouterr()
    assert "b/copy.mp4: the same bytes as a/good.mp4; --drop-duplicates would leave it out" in told.err
    report = json.loads(told.out)
    assert (report["videos"], report["duplicates"]) == (2, 1)
    assert build(source, tmp_path / "one", "--json", "--drop-duplicates") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["videos"], report["duplicates"], report["refused"]["duplicate"]) == (1, 1, 1)

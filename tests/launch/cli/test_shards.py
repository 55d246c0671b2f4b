from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataloading.synthetic.videos import write_video
from launch.cli.main import main
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE

OPTIONS = ("--flow", "dis", "--short-side", "0", "--window", "8", "--workers", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One good video, one that is too short, a broken one, and a file that is no video."""
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


def test_a_build_logs_every_refusal_and_prints_a_table(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, tmp_path / "set") == 0
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        f"{source}: 1 files skipped, their extension is not that of a video",
        "a/broken.mp4: refused, unreadable: Invalid data found when processing input; "
        "replace the file, it is no video or was cut off",
        "a/short.mp4: refused, too short: 7 frames, a window has 8; leave it out or give a smaller --window",
    ]
    table = dict(line.rsplit(maxsplit=1) for line in output.out.splitlines())
    assert table["videos"] == "1"
    assert table["refused, too short"] == "1"


def test_a_build_can_print_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(source, tmp_path / "set", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["videos"], report["frames"], report["shards"]) == (1, 12, 1)
    assert report["refused"] == {"too short": 1, "unreadable": 1}


def test_a_complete_set_is_not_built_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(source, tmp_path / "set") == 0
    before = (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns
    assert build(source, tmp_path / "set") == 0
    assert "already complete" in capsys.readouterr().err
    assert (tmp_path / "set" / "shard-000000.tar").stat().st_mtime_ns == before


def test_another_configuration_than_that_of_a_complete_set_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, tmp_path / "set") == 0
    capsys.readouterr()
    assert build(source, tmp_path / "set", "--quality", "50") == EXIT_FAILURE
    assert "built with another quality" in capsys.readouterr().err.splitlines()[-1]


def test_the_flow_has_the_requested_size_and_the_manifest_records_it(source: Path, tmp_path: Path) -> None:
    assert build(source, tmp_path / "half", "--flow-size", "0.5") == 0
    assert build(source, tmp_path / "whole") == 0
    builds = [json.loads((tmp_path / name / "manifest.json").read_bytes())["build"] for name in ("half", "whole")]
    assert [build["flow_size"] for build in builds] == [0.5, 1.0]
    with tarfile.open(tmp_path / "half" / "shard-000000.tar") as tar:
        (member,) = (each for each in tar if each.name.endswith(".json"))
        info = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
    assert (info["flow_height"], info["flow_width"]) == (24, 32)
    assert build(source, tmp_path / "half") == EXIT_FAILURE


def test_a_missing_source_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tmp_path / "none", tmp_path / "set") == EXIT_FAILURE
    assert capsys.readouterr().err == f"mcl: {tmp_path}/none: no such file or folder; check the path\n"


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
def test_an_option_out_of_range_is_a_usage_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert build(source, tmp_path / "set", option, value) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_verifying_an_intact_set_succeeds(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(source, tmp_path / "set")
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "set"), "--json"]) == 0
    size = (tmp_path / "set" / "shard-000000.tar").stat().st_size
    assert json.loads(capsys.readouterr().out) == {"videos": 1, "shards": 1, "bytes": size, "problems": []}


def test_verifying_a_damaged_set_fails_with_one_line_per_problem(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(source, tmp_path / "set")
    (tmp_path / "set" / "stray").touch()
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "set"), "--json"]) == EXIT_FAILURE
    output = capsys.readouterr()
    problem = f"{tmp_path}/set/stray: the manifest does not name it; remove it"
    assert json.loads(output.out)["problems"] == [problem]
    assert output.err == f"{problem}\n"


def test_verifying_a_folder_without_a_set_prints_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", str(tmp_path), "--json"]) == EXIT_FAILURE
    output = capsys.readouterr()
    assert json.loads(output.out)["videos"] == 0
    assert "manifest.json: missing" in json.loads(output.out)["problems"][0]
    assert output.err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_leaves_no_worker_and_no_partial_file(source: Path, tmp_path: Path) -> None:
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
    # With this seed the broken video comes first: its refusal shows that the build has started.
    command += ["--window", "8", "--workers", "2", "--seed", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while "refused" not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    # The workers hold the pipe too, so its end means that all of them have exited.
    errors = process.communicate(timeout=60)[1]
    assert errors.splitlines()[-1] == "mcl: interrupted"
    assert not (tmp_path / "set").exists()


def test_a_listed_video_that_is_missing_is_counted_as_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text(
        "label,youtube_id,time_start,time_end,split\na,good,1,11,train\na,gone,1,11,train\nb,broken,1,11,test\n"
    )
    assert build(source, tmp_path / "set", "--list", str(tmp_path / "list.csv"), "--split", "train", "--json") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["refused"] == {"missing": 1}
    assert json.loads((tmp_path / "set" / "manifest.json").read_bytes())["classes"] == ["a", "b"]
    assert "gone_000001_000011: refused, missing: no such file below SRC" in output.err


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
def test_contradictory_list_options_are_a_usage_error(source: Path, tmp_path: Path, options: list[str]) -> None:
    assert build(source, tmp_path / "set", *options) == EXIT_USAGE


def test_duplicates_are_logged_and_dropped_on_request(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "b").mkdir()
    (source / "b" / "copy.mp4").write_bytes((source / "a" / "good.mp4").read_bytes())
    assert build(source, tmp_path / "both", "--json") == 0
    output = capsys.readouterr()
    assert "b/copy.mp4: the same bytes as a/good.mp4; --drop-duplicates stores only the first" in output.err
    report = json.loads(output.out)
    assert (report["videos"], report["duplicates"]) == (2, 1)
    assert build(source, tmp_path / "one", "--json", "--drop-duplicates") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["videos"], report["duplicates"], report["refused"]["duplicate"]) == (1, 1, 1)

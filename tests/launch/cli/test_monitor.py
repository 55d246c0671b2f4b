from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from launch.cli.main import main
from launch.terminal.monitor_screen import sparkline
from launch.terminal.units import format_bytes, format_counts, format_duration, format_number, format_percent, printable
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE
from mcl_dist.events import CheckpointWritten, Evaluated, Notice, Started, StepDone
from monitoring.history.run_view import VERSION
from tests.support.run_files import write_events

SECONDS = 10


def done(step: int) -> StepDone:
    losses = {"loss": 9.0 / step, "loss_inter": 8.0 / step}
    return StepDone(step, 0, 100, losses, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.125, gradient_norm=2.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    write_events(
        folder,
        Started(0, 100, None),
        *[done(step) for step in range(1, 41)],
        CheckpointWritten(40, "there", 1.5, 0.1, 412),
        Evaluated(40, {"top1": 0.5, "top5": 0.75, "mean_class": 0.25}, 12.0),
    )
    return folder


def test_a_run_is_printed_as_plain_text_without_a_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(run)]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("first")
    assert "step 40 of 100" in lines[1]
    for label, value in (
        ("online kNN", "top-1 50%"),
        ("total loss", "0.225"),
        ("inter", "0.200"),
        ("videos/s", "16.0"),
        ("data wait", "12%"),
    ):
        assert any(line.split("  ")[0] == label and value in line for line in lines), label
    assert "step 40" in next(line for line in lines if line.startswith("checkpoint"))


def test_json_output_is_the_run_view(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(run), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["version"], view["run"], view["state"], view["step"]) == (VERSION, "first", "running", 40)


def test_control_characters_and_markup_in_messages_are_inert(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(run, Notice("\033]0;taken\a[red]bad[/red]\nname"))
    assert main(["monitor", str(run)]) == 0
    assert "�]0;taken�[red]bad[/red] name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "no such run folder"),
        (lambda folder: folder.mkdir(), "no run has written there yet"),
        (lambda folder: folder.write_text(""), "no such run folder"),
    ],
)
def test_a_missing_run_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "run")
    assert main(["monitor", str(tmp_path / "run")]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_run_without_a_step_is_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path, Started(0, 100, None))
    assert main(["monitor", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("starting")


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_a_non_positive_interval_is_a_usage_error(run: Path, capsys: pytest.CaptureFixture[str], interval: str) -> None:
    assert main(["monitor", str(run), f"--interval={interval}"]) == EXIT_USAGE
    assert "--interval: found" in capsys.readouterr().err


def test_a_sparkline_keeps_gaps_extremes_and_its_width() -> None:
    assert sparkline([0.0, None, 7.0], 4) == ["▁ █ "]
    assert sparkline([1.0, 1.0], 2) == ["▅▅"]
    assert sparkline([None], 3) == ["   "]
    assert sparkline([0.0, 1.0], 2, height=2) == [" █", "▁█"]
    assert [len(line) for line in sparkline([math.sin(x) for x in range(1000)], 50, height=3)] == [50] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_number(None), "-"),
        (format_number(0.0), "0"),
        (format_number(0.0267), "0.0267"),
        (format_number(12345.6), "12,346"),
        (format_number(1.0e-6), "1.00e-06"),
        (format_percent(0.0234), "2.3%"),
        (format_percent(0.94), "94%"),
        (format_bytes(412e6), "412 MB"),
        (format_bytes(1.5e15), "1,500 TB"),
        (format_duration(0.25), "0.25 s"),
        (format_duration(59.7), "1 min"),
        (format_duration(3725), "1 h 2 min"),
        (format_duration(90000), "1 d 1 h"),
        (format_counts({"stall": 3, "reset": 0}), "3 (stall 3)"),
        (format_counts({}), "0"),
        (printable("a\tb\n\033c"), "a b �c"),
    ],
)
def test_numbers_are_formatted_with_units(text: str, expected: str) -> None:
    assert text == expected


class Terminal:
    """A shell in a separate tmux server."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ("tmux", "-f", "/dev/null", "-S", str(folder / f"tmux-{uuid4().hex[:8]}"))
        self._run("new-session", "-d", "-x", "80", "-y", "24", "-s", "a", "COLUMNS=80 LINES=24 sh")

    def _run(self, *arguments: str) -> str:
        return subprocess.run(
            [*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=SECONDS
        ).stdout

    def type(self, *keys: str) -> None:
        self._run("send-keys", "-t", "a", *keys)

    def resize(self, columns: int, lines: int) -> None:
        self._run("resize-window", "-t", "a", "-x", str(columns), "-y", str(lines))

    def screen(self) -> list[str]:
        return self._run("capture-pane", "-t", "a", "-p").splitlines()

    def is_alternate(self) -> bool:
        return self._run("display-message", "-t", "a", "-p", "#{alternate_on}#{cursor_flag}").strip() == "10"

    def wait_for(self, condition: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + SECONDS
        while not condition(lines := self.screen()):
            if time.monotonic() > deadline:
                pytest.fail("not seen in time:\n" + "\n".join(lines))
            time.sleep(0.05)
        return lines

    def close(self) -> None:
        self._run("kill-server")


@pytest.fixture
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed (Debian: apt install tmux)")
    opened = Terminal(tmp_path_factory.mktemp("t"))
    yield opened
    opened.close()


def watch(terminal: Terminal, run: Path, *options: str) -> None:
    command = [sys.executable, "-m", "launch.cli.main", "monitor", str(run), "--interval", "0.2", *options]
    terminal.type(f"cd {shlex.quote(str(Path.cwd()))}; {shlex.join(command)}; echo exit code $?", "Enter")


@pytest.mark.slow
def test_the_screen_follows_the_run_and_the_terminal_size_and_is_removed(terminal: Terminal, run: Path) -> None:
    watch(terminal, run)
    lines = terminal.wait_for(lambda lines: "step 40 of 100" in lines[1])
    assert terminal.is_alternate()
    assert all(len(line) <= 80 for line in lines)
    assert "running" in lines[0]
    write_events(run, done(41))
    terminal.wait_for(lambda lines: "step 41 of 100" in lines[1])
    terminal.resize(200, 50)
    lines = terminal.wait_for(lambda lines: len(lines) == 50 and "step 41 of 100" in lines[1][150:])
    assert "checkpoint" in "".join(line[100:] for line in lines)  # now beside the sparklines
    terminal.resize(40, 6)
    terminal.wait_for(lambda lines: len(lines) == 6 and lines[0].startswith("first"))
    terminal.resize(80, 24)
    terminal.type("C-c")
    lines = terminal.wait_for(lambda lines: "exit code 0" in lines)
    assert not terminal.is_alternate()
    assert any("step 41 of 100" in line for line in lines)  # the last view remains


def test_a_deleted_run_folder_keeps_the_last_view_and_shows_the_error(terminal: Terminal, run: Path) -> None:
    watch(terminal, run)
    terminal.wait_for(lambda lines: "step 40 of 100" in lines[1])
    shutil.rmtree(run)
    lines = terminal.wait_for(lambda lines: "no such run folder" in " ".join(" ".join(lines).split()))
    assert "step 40 of 100" in lines[1]

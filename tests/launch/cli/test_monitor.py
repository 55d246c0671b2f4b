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
from launch.terminal.sparkline import sparkline
from launch.terminal.units import counted, duration, number, printable, ratio, size
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE
from mcl_dist.events import CheckpointWritten, Evaluated, Event, Notice, Started, StepDone
from mcl_dist.run_log.listeners import EventLog, MetricsFile
from monitoring.history.run_view import VERSION

SECONDS = 10


def write(folder: Path, *events: Event) -> None:
    listeners = (MetricsFile(folder / "metrics.jsonl"), EventLog(folder / "log.jsonl"))
    for event in events:
        for listener in listeners:
            listener(event)


def done(step: int) -> StepDone:
    losses = {"loss": 9.0 / step, "loss_inter": 8.0 / step}
    return StepDone(step, 0, 100, losses, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.125, gradient_norm=2.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    write(
        folder,
        Started(0, 100, None),
        *[done(step) for step in range(1, 41)],
        CheckpointWritten(40, "there", 1.5, 0.1, 412),
        Evaluated(40, {"top1": 0.5, "top5": 0.75, "mean_class": 0.25}, 12.0),
    )
    return folder


def test_a_run_is_printed_as_plain_text_where_nobody_watches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(run)]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("first")
    assert "step 40 of 100" in lines[1]
    for label, value in (
        ("kNN", "top-1 50%"),
        ("total loss", "0.225"),
        ("inter", "0.200"),
        ("videos/s", "16.0"),
        ("waiting", "12%"),
    ):
        assert any(line.split("  ")[0] == label and value in line for line in lines), label
    assert "step 40" in next(line for line in lines if line.startswith("checkpoint"))


def test_json_is_what_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(run), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["version"], view["run"], view["state"], view["step"]) == (VERSION, "first", "running", 40)


def test_a_text_of_others_is_nothing_but_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, Notice("\033]0;taken\a[red]bad[/red]\nname"))
    assert main(["monitor", str(run)]) == 0
    assert "�]0;taken�[red]bad[/red] name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: None, "no such run folder"),
        (lambda folder: folder.mkdir(), "no run has written there yet"),
        (lambda folder: folder.write_text(""), "no such run folder"),
    ],
)
def test_a_run_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path / "run")
    assert main(["monitor", str(tmp_path / "run")]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_a_run_without_a_step_yet_is_shown_as_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, Started(0, 100, None))
    assert main(["monitor", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("starting")


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_an_interval_that_is_none_is_wrong_usage(run: Path, capsys: pytest.CaptureFixture[str], interval: str) -> None:
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
        (number(None), "-"),
        (number(0.0), "0"),
        (number(0.0267), "0.0267"),
        (number(12345.6), "12,346"),
        (number(1.0e-6), "1.00e-06"),
        (ratio(0.0234), "2.3%"),
        (ratio(0.94), "94%"),
        (size(412e6), "412 MB"),
        (size(1.5e15), "1,500 TB"),
        (duration(0.25), "0.25 s"),
        (duration(59.7), "1 min"),
        (duration(3725), "1 h 2 min"),
        (duration(90000), "1 d 1 h"),
        (counted({"stall": 3, "reset": 0}), "3 (stall 3)"),
        (counted({}), "0"),
        (printable("a\tb\n\033c"), "a b �c"),
    ],
)
def test_numbers_are_told_with_what_matters_of_them(text: str, expected: str) -> None:
    assert text == expected


class Terminal:
    """A shell in a tmux of its own."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ("tmux", "-f", "/dev/null", "-S", str(folder / f"tmux-{uuid4().hex[:8]}"))
        self._do("new-session", "-d", "-x", "80", "-y", "24", "-s", "a", "COLUMNS=80 LINES=24 sh")

    def _do(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True, timeout=SECONDS).stdout

    def type(self, *keys: str) -> None:
        self._do("send-keys", "-t", "a", *keys)

    def resize(self, columns: int, lines: int) -> None:
        self._do("resize-window", "-t", "a", "-x", str(columns), "-y", str(lines))

    def screen(self) -> list[str]:
        return self._do("capture-pane", "-t", "a", "-p").splitlines()

    def is_alternate(self) -> bool:
        return self._do("display-message", "-t", "a", "-p", "#{alternate_on}#{cursor_flag}").strip() == "10"

    def until(self, is_so: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + SECONDS
        while not is_so(lines := self.screen()):
            if time.monotonic() > deadline:
                pytest.fail("never seen:\n" + "\n".join(lines))
            time.sleep(0.05)
        return lines

    def close(self) -> None:
        self._do("kill-server")


@pytest.fixture
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("no tmux on this machine (Debian: apt install tmux)")
    opened = Terminal(tmp_path_factory.mktemp("t"))
    yield opened
    opened.close()


def watch(terminal: Terminal, run: Path, *options: str) -> None:
    words = [sys.executable, "-m", "launch.cli.main", "monitor", str(run), "--interval", "0.2", *options]
    terminal.type(f"cd {shlex.quote(str(Path.cwd()))}; {shlex.join(words)}; echo left $?", "Enter")


def test_a_terminal_is_filled_follows_the_run_and_its_size_and_is_given_back(terminal: Terminal, run: Path) -> None:
    watch(terminal, run)
    lines = terminal.until(lambda lines: "step 40 of 100" in lines[1])
    assert terminal.is_alternate()
    assert all(len(line) <= 80 for line in lines)
    assert "running" in lines[0]
    write(run, done(41))
    terminal.until(lambda lines: "step 41 of 100" in lines[1])
    terminal.resize(200, 50)
    lines = terminal.until(lambda lines: len(lines) == 50 and "step 41 of 100" in lines[1][150:])
    assert "checkpoint" in "".join(line[100:] for line in lines)  # beside the curves now
    terminal.resize(40, 6)
    terminal.until(lambda lines: len(lines) == 6 and lines[0].startswith("first"))
    terminal.resize(80, 24)
    terminal.type("C-c")
    lines = terminal.until(lambda lines: "left 0" in lines)
    assert not terminal.is_alternate()
    assert any("step 41 of 100" in line for line in lines)  # the last view stays


def test_a_folder_that_vanishes_leaves_the_last_view_and_says_so(terminal: Terminal, run: Path) -> None:
    watch(terminal, run)
    terminal.until(lambda lines: "step 40 of 100" in lines[1])
    shutil.rmtree(run)
    lines = terminal.until(lambda lines: "no such run folder" in " ".join(" ".join(lines).split()))
    assert "step 40 of 100" in lines[1]

from __future__ import annotations

import io
import os
import pty
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import pytest

from dataloading.build.builder import ResumedBuild
from dataloading.shards.format import RefusedVideo
from launch.terminal.build_progress import BuildProgress
from launch.terminal.progress import ProgressLine, track

ERASE_LINE = "\x1b[2K"
SHOW_CURSOR = "\x1b[?25h"


def terminal_output(write: Callable[[TextIO], None]) -> str:
    """What `write` sends to a terminal."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        write(terminal)
    chunks = []
    with suppress(OSError):  # the end of a terminal whose other side is closed
        while chunk := os.read(leader, 4096):
            chunks.append(chunk)
    os.close(leader)
    return b"".join(chunks).decode()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def test_a_terminal_rewrites_one_line_and_ends_without_it() -> None:
    def write(terminal: TextIO) -> None:
        line = ProgressLine(terminal)
        line.update("1 of 2")
        line.update("2 of 2", now=True)
        line.close()

    output = terminal_output(write)
    first, _, rest = output.partition("1 of 2")
    assert "\n" not in first
    assert rest.index(ERASE_LINE) < rest.index("2 of 2") < rest.rindex(ERASE_LINE)
    assert SHOW_CURSOR in rest


def test_a_terminal_is_redrawn_at_most_once_per_interval() -> None:
    def write(terminal: TextIO) -> None:
        line = ProgressLine(terminal)
        for number in range(1000):
            line.update(f"status {number}")
        line.close()

    assert terminal_output(write).count("status") < 500


def test_a_logged_line_stays_above_the_progress_line() -> None:
    def write(terminal: TextIO) -> None:
        line = ProgressLine(terminal)
        line.update("working")
        line.log("[bold] " + 150 * "x")
        line.close()

    output = terminal_output(write)
    assert "[bold] " + 150 * "x" in output
    assert output.count("working") == 3  # drawn, drawn again below the log line, and erased


def test_a_file_gets_plain_lines_and_only_forced_updates_at_once() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.update("0 of 2", now=True)
    line.update("1 of 2")
    line.log("warning")
    line.close()
    assert stream.getvalue() == "0 of 2\nwarning\n"


def test_a_file_gets_an_update_after_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.terminal.progress.PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    line = ProgressLine(stream)
    line.update("1 of 2")
    line.update("2 of 2")
    assert stream.getvalue() == "1 of 2\n2 of 2\n"


def test_tracked_items_are_yielded_between_a_start_and_an_end_line() -> None:
    stream = io.StringIO()
    assert list(track("abc", 3, "3 letters", stream)) == ["a", "b", "c"]
    start, end = stream.getvalue().splitlines()
    assert start == "3 letters …"
    assert end.startswith("3 letters: 0.0 s")


def test_an_error_in_a_tracked_loop_removes_the_progress_line() -> None:
    def write(terminal: TextIO) -> None:
        items = track("abc", 3, "3 letters", terminal)
        next(items)
        items.close()  # type: ignore[attr-defined]

    output = terminal_output(write)
    assert "3 letters …" in output
    assert output.rindex(ERASE_LINE) > output.rindex("3 letters")
    assert SHOW_CURSOR in output


def test_a_build_logs_refusals_and_shows_counts_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(terminal: TextIO) -> None:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = BuildProgress(total=2)
        progress(RefusedVideo("a/x.mp4", "too short: 3 frames"))
        progress.close()

    output = terminal_output(write)
    assert "a/x.mp4: refused, too short: 3 frames" in output
    assert re.search(r"1 of 2 videos, 1 refused, \d+\.\d\d videos/s, 0\.0 MB/s, about 0 s left", output)


def test_a_resumed_build_counts_the_kept_videos(capsys: pytest.CaptureFixture[str]) -> None:
    progress = BuildProgress(total=9)
    progress(ResumedBuild("process 7 on node1", 2, 3, 1))
    assert progress.num_built == 0
    assert capsys.readouterr().err.splitlines() == [
        "took over the lease of an earlier build (process 7 on node1), which has ended",
        "resuming after 2 finished shards with 3 videos, 1 refused",
    ]

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from wsgiref.simple_server import WSGIRequestHandler, make_server

import cv2
import pytest

from mcl_dist.events import CheckpointWritten, Evaluated, Event, Finished, Notice, Started, StepDone, StepSkipped
from mcl_dist.run_log.listeners import EventLog, MetricsFile
from monitoring.history.run_folder import RunFolder
from monitoring.web.app import Page

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


def write(folder: Path, *events: Event) -> None:
    listeners = (MetricsFile(folder / "metrics.jsonl"), EventLog(folder / "log.jsonl"))
    for event in events:
        for listener in listeners:
            listener(event)


def done(step: int, loss: float) -> StepDone:
    return StepDone(step, 0, 60, {"loss": loss, "loss_inter": loss}, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.1)


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run folder's path, and the URL of its page."""
    folder = tmp_path / "run"
    folder.mkdir()
    with make_server("127.0.0.1", 0, Page(RunFolder(folder).view), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def browse(url: str, profile: Path, *options: str, scheme: int = 1, size: str = "1200,1600") -> str:
    """What the page came to, and on standard error what its console says."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += [
        f"--user-data-dir={profile}",
        f"--window-size={size}",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    command += ["--virtual-time-budget=2000", *options, f"{url}/"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in result.stderr
    return result.stdout


def test_the_page_and_its_view_are_served_under_a_strict_policy(served: tuple[Path, str]) -> None:
    folder, url = served
    write(folder, Started(0, 60, None), done(1, 3.0))
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in answer.read().decode().replace("http://www.w3.org/2000/svg", "")
    with urllib.request.urlopen(f"{url}/api/history", timeout=10) as answer:
        assert json.load(answer)["step"] == 1


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/../app.py", "GET", 404), ("/", "POST", 405), ("/x", "GET", 404)]
)
def test_nothing_else_is_served(served: tuple[Path, str], path: str, method: str, status: int) -> None:
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(served[1] + path, method=method), timeout=10)
    assert refused.value.code == status
    refused.value.close()


def test_a_folder_without_a_run_yet_is_told(served: tuple[Path, str]) -> None:
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(f"{served[1]}/api/history", timeout=10)
    assert refused.value.code == 503
    assert b"no run has written there yet" in refused.value.read()
    refused.value.close()


@pytest.mark.slow
def test_a_browser_draws_the_curves_with_their_gaps_and_runs_none_of_the_names(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = served
    steps = [done(step, float("nan") if step in (10, 12) else 5.0 / step) for step in range(1, 21)]
    skipped = StepSkipped(10, [HOSTILE], "the loss is not finite", 1)
    written = (CheckpointWritten(20, "there", 1.5, 0.1, 412), Evaluated(20, {"top1": 0.375, "top5": 0.75}, 9.0))
    write(folder, Started(0, 60, None), *steps, skipped, *written, Notice(HOSTILE))
    dom = browse(url, tmp_path / "profile", "--dump-dom")
    assert "<title>run: running</title>" in dom
    assert "step 20 of 60" in dom
    for title in ("Losses (nats)", "Throughput (videos/s)", "Learning rate (per step)", "Gradient norm (2-norm)"):
        assert title in dom
    assert "total 0.25" in dom
    assert "kNN of held-out videos (% right)" in dom
    assert "37.5 % at step 20, took 9 s" in dom
    curve = re.search(r'<path class="curve s0" d="([^"]*)"', dom)
    assert curve
    assert curve[1].count("M") == 3  # before, between and after the two gaps
    assert "NaN" not in dom
    assert "&lt;img" in dom
    assert "<img" not in dom


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "size"), [(0, "1200,1600"), (1, "500,900")])
def test_the_page_is_dark_or_light_as_asked_and_fits_a_phone(
    served: tuple[Path, str], tmp_path: Path, scheme: int, size: str
) -> None:
    folder, url = served
    write(folder, Started(0, 60, None), *[done(step, 5.0 / step) for step in range(1, 61)], Finished(60, 1))
    picture = tmp_path / "page.png"
    browse(url, tmp_path / "profile", f"--screenshot={picture}", scheme=scheme, size=size)
    drawn = cv2.imread(str(picture))
    assert f"{drawn.shape[1]},{drawn.shape[0]}" == size
    brightness = drawn.mean(axis=2)
    assert (brightness < 60).mean() > 0.5 if scheme == 0 else (brightness > 200).mean() > 0.5


@pytest.mark.slow
def test_a_run_without_a_step_yet_is_drawn_as_nothing_yet(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    write(folder, Started(0, 60, None))
    dom = browse(url, tmp_path / "profile", "--dump-dom")
    assert "<title>run: starting</title>" in dom
    assert "nothing yet" in dom
    assert "undefined" not in dom

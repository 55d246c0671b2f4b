from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from wsgiref.simple_server import WSGIRequestHandler, make_server

import cv2
import pytest

from mcl_dist.events import CheckpointWritten, Evaluated, Finished, Notice, Started, StepDone, StepSkipped
from monitoring.history.run_folder import RunFolder
from monitoring.web.app import RunApp
from tests.support.browser import chromium
from tests.support.run_files import write_events

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


def done(step: int, loss: float) -> StepDone:
    return StepDone(step, 0, 60, {"loss": loss, "loss_inter": loss}, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.1)


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run folder and the URL of its page."""
    folder = tmp_path / "run"
    folder.mkdir()
    with make_server("127.0.0.1", 0, RunApp(RunFolder(folder).view), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def browse(url: str, profile: Path, *options: str, scheme: int = 1, size: str = "1200,1600") -> str:
    """Open the page in Chromium and return its standard output; fails on a console message."""
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=2000", *options)
    result = chromium(profile, f"{url}/", *options, size=size)
    assert "CONSOLE" not in result.stderr
    return result.stdout


def test_the_page_and_its_data_are_served_with_a_strict_content_security_policy(served: tuple[Path, str]) -> None:
    folder, url = served
    write_events(folder, Started(0, 60, None), done(1, 3.0))
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        with urllib.request.urlopen(url + path, timeout=10) as response:
            assert response.headers["Content-Type"].startswith(kind)
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in response.read().decode().replace("http://www.w3.org/2000/svg", "")
    with urllib.request.urlopen(f"{url}/api/history", timeout=10) as response:
        assert json.load(response)["step"] == 1


@pytest.mark.parametrize(
    ("path", "method", "status"), [("/../app.py", "GET", 404), ("/", "POST", 405), ("/x", "GET", 404)]
)
def test_other_paths_and_methods_are_refused(served: tuple[Path, str], path: str, method: str, status: int) -> None:
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(served[1] + path, method=method), timeout=10)
    assert refused.value.code == status
    refused.value.close()


def test_a_folder_without_a_run_is_reported(served: tuple[Path, str]) -> None:
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(f"{served[1]}/api/history", timeout=10)
    assert refused.value.code == 503
    assert b"no run has written there yet" in refused.value.read()
    refused.value.close()


@pytest.mark.slow
def test_a_browser_draws_curves_with_gaps_and_escapes_names(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    steps = [done(step, float("nan") if step in (10, 12) else 5.0 / step) for step in range(1, 21)]
    skipped = StepSkipped(10, [HOSTILE], "the loss is not finite", 1)
    written = (CheckpointWritten(20, "there", 1.5, 0.1, 412), Evaluated(20, {"top1": 0.375, "top5": 0.75}, 9.0))
    write_events(folder, Started(0, 60, None), *steps, skipped, *written, Notice(HOSTILE))
    dom = browse(url, tmp_path / "profile", "--dump-dom")
    assert "<title>run: running</title>" in dom
    assert "step 20 of 60" in dom
    for title in ("Losses (nats)", "Throughput (videos/s)", "Learning rate</h2>", "Gradient norm (L2)"):
        assert title in dom
    assert "total 0.25" in dom
    assert "Online kNN (% accuracy)" in dom
    assert "37.5 % at step 20, took 9 s" in dom
    curve = re.search(r'<path class="curve s0" d="([^"]*)"', dom)
    assert curve
    assert curve[1].count("M") == 3  # before, between and after the two gaps
    assert "NaN" not in dom
    assert "&lt;img" in dom
    assert "<img" not in dom


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "size"), [(0, "1200,1600"), (1, "500,900")])
def test_the_page_has_a_dark_and_a_light_theme_and_fits_a_phone(
    served: tuple[Path, str], tmp_path: Path, scheme: int, size: str
) -> None:
    folder, url = served
    write_events(folder, Started(0, 60, None), *[done(step, 5.0 / step) for step in range(1, 61)], Finished(60, 1))
    screenshot = tmp_path / "page.png"
    browse(url, tmp_path / "profile", f"--screenshot={screenshot}", scheme=scheme, size=size)
    image = cv2.imread(str(screenshot))
    assert f"{image.shape[1]},{image.shape[0]}" == size
    brightness = image.mean(axis=2)
    assert (brightness < 60).mean() > 0.5 if scheme == 0 else (brightness > 200).mean() > 0.5


@pytest.mark.slow
def test_a_run_without_a_step_is_drawn_without_data(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    write_events(folder, Started(0, 60, None))
    dom = browse(url, tmp_path / "profile", "--dump-dom")
    assert "<title>run: starting</title>" in dom
    assert "no data yet" in dom
    assert "undefined" not in dom

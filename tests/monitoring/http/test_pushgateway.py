from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from launch.cli.main import main
from monitoring.http.client import HttpClient
from monitoring.http.pushgateway import Pushgateway
from monitoring.metrics.registry import Registry
from tests.support.real_prometheus import until


@dataclass
class Receiver:
    """A gateway that keeps what it is sent, and answers as it is told."""

    url: str = ""
    status: int = 200
    pushed: list[tuple[str, str, str, str]] = field(default_factory=list)  # method, path, credentials, body


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            kept.pushed.append((self.command, self.path, self.headers.get("Authorization", ""), body))
            self.send_response(kept.status)
            self.send_header("Location", f"{kept.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield kept
    server.shutdown()
    server.server_close()
    thread.join()


def registered() -> tuple[Registry, CollectorRegistry]:
    board, registry = Registry(["build"]), CollectorRegistry()
    registry.register(board)
    return board, registry


def test_metrics_are_pushed_now_and_then_and_at_the_end(receiver: Receiver) -> None:
    board, registry = registered()
    gateway = Pushgateway(
        HttpClient(receiver.url), "mcl-build", {"run": "set", "instance": "here"}, pytest.fail, seconds=0.01
    )
    board.set("mcl_build_complete", 0)
    with gateway.pushing(registry, pytest.fail):
        assert until(lambda: len(receiver.pushed) > 1, 20)
        board.set("mcl_build_complete", 1)
    assert {push[:3] for push in receiver.pushed} == {("PUT", "/metrics/job/mcl-build/instance/here/run/set", "")}
    assert "mcl_build_complete 0.0" in receiver.pushed[0][3].splitlines()
    assert "mcl_build_complete 1.0" in receiver.pushed[-1][3].splitlines()


@pytest.mark.parametrize(("status", "says"), [(503, "503"), (302, "302"), (None, "refused")])
def test_a_gateway_that_takes_nothing_is_told_once_and_counted_and_fails_nothing(
    receiver: Receiver, status: int | None, says: str
) -> None:
    board, registry = registered()
    told: list[str] = []
    receiver.status = status or 200
    url = receiver.url if status else "http://127.0.0.1:1"
    gateway = Pushgateway(HttpClient(url), "mcl-build", {}, told.append, seconds=0.01)
    with gateway.pushing(registry, lambda: board.add("mcl_build_pushes_failed_total")):
        assert until(lambda: (registry.get_sample_value("mcl_build_pushes_failed_total") or 0) > 1, 20)
    failed = registry.get_sample_value("mcl_build_pushes_failed_total")
    assert len(told) == 2
    assert says in told[0]
    assert told[1] == f"{url}: {failed:.0f} pushes of metrics failed"
    assert not [path for _, path, *_ in receiver.pushed if path == "/elsewhere"]


def test_a_build_pushes_with_a_password_from_a_file_and_tells_it_nobody(
    receiver: Receiver, synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "credentials"
    secret.touch(mode=0o600)
    secret.write_text("ada:canary\n")
    (tmp_path / "videos" / "class").mkdir(parents=True)
    video = next((synthetic_shards.parent / "train").glob("*/*"))
    (tmp_path / "videos" / "class" / video.name).write_bytes(video.read_bytes())
    receiver.status = 401
    words = ["shards", "build", str(tmp_path / "videos"), str(tmp_path / "set"), "--flow", "dis", "--short-side", "0"]
    assert main([*words, "--push-gateway", receiver.url, "--push-credentials", str(secret)]) == 0
    ((_, path, credentials, body),) = receiver.pushed
    assert path.endswith("/run/set")
    assert credentials == "Basic " + base64.b64encode(b"ada:canary").decode()
    assert "mcl_build_complete 1.0" in body.splitlines()
    said = capsys.readouterr()
    assert "it answers 401" in said.err
    assert "canary" not in said.out + said.err
    assert credentials.split()[1] not in said.out + said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--push-gateway", "http://ada:canary@127.0.0.1:9091"], "--push-credentials FILE"),
        (["--push-gateway", "127.0.0.1:9091"], "must be http://HOST:PORT"),
        (["--push-gateway", "ada:canary@127.0.0.1:9091"], "must be http://HOST:PORT"),
        (["--push-gateway", "http://[bad"], "http://[bad: no URL"),
        (["--push-credentials", "secret"], "--push-credentials: found 'secret' without --push-gateway"),
    ],
)
def test_a_gateway_that_is_none_is_refused_untold(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "build", str(tmp_path), str(tmp_path / "set"), *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "canary" not in error

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
    """A Pushgateway that records the pushes and answers with `status`."""

    url: str = ""
    status: int = 200
    pushed: list[tuple[str, str, str, str]] = field(default_factory=list)  # method, path, credentials, body


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            state.pushed.append((self.command, self.path, self.headers.get("Authorization", ""), body))
            self.send_response(state.status)
            self.send_header("Location", f"{state.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def registry_and_collectors() -> tuple[Registry, CollectorRegistry]:
    registry, collectors = Registry(["build"]), CollectorRegistry()
    collectors.register(registry)
    return registry, collectors


def test_metrics_are_pushed_periodically_and_at_the_end(receiver: Receiver) -> None:
    registry, collectors = registry_and_collectors()
    pushgateway = Pushgateway(
        HttpClient(receiver.url), "mcl-build", {"run": "set", "instance": "here"}, pytest.fail, seconds=0.01
    )
    registry.set("mcl_build_complete", 0)
    with pushgateway.push_periodically(collectors, pytest.fail):
        assert until(lambda: len(receiver.pushed) > 1, 20)
        registry.set("mcl_build_complete", 1)
    assert {push[:3] for push in receiver.pushed} == {("PUT", "/metrics/job/mcl-build/instance/here/run/set", "")}
    assert "mcl_build_complete 0.0" in receiver.pushed[0][3].splitlines()
    assert "mcl_build_complete 1.0" in receiver.pushed[-1][3].splitlines()


@pytest.mark.parametrize(("status", "reason"), [(503, "503"), (302, "302"), (None, "refused")])
def test_failing_pushes_are_logged_once_and_counted_and_raise_nothing(
    receiver: Receiver, status: int | None, reason: str
) -> None:
    registry, collectors = registry_and_collectors()
    log: list[str] = []
    receiver.status = status or 200
    url = receiver.url if status else "http://127.0.0.1:1"
    pushgateway = Pushgateway(HttpClient(url), "mcl-build", {}, log.append, seconds=0.01)
    with pushgateway.push_periodically(collectors, lambda: registry.add("mcl_build_pushes_failed_total")):
        assert until(lambda: (collectors.get_sample_value("mcl_build_pushes_failed_total") or 0) > 1, 20)
    failed = collectors.get_sample_value("mcl_build_pushes_failed_total")
    assert len(log) == 2
    assert reason in log[0]
    assert log[1] == f"{url}: {failed:.0f} metrics pushes failed"
    assert not [path for _, path, *_ in receiver.pushed if path == "/elsewhere"]


@pytest.mark.slow
def test_a_build_pushes_with_a_password_from_a_file_and_does_not_log_it(
    receiver: Receiver, synthetic_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "credentials"
    secret.touch(mode=0o600)
    secret.write_text("ada:canary\n")
    (tmp_path / "videos" / "class").mkdir(parents=True)
    video = next((synthetic_shards.parent / "train").glob("*/*"))
    (tmp_path / "videos" / "class" / video.name).write_bytes(video.read_bytes())
    receiver.status = 401
    command = ["shards", "build", str(tmp_path / "videos"), str(tmp_path / "set"), "--flow", "dis", "--short-side", "0"]
    assert main([*command, "--push-gateway", receiver.url, "--push-credentials", str(secret)]) == 0
    ((_, path, credentials, body),) = receiver.pushed
    assert path.endswith("/run/set")
    assert credentials == "Basic " + base64.b64encode(b"ada:canary").decode()
    assert "mcl_build_complete 1.0" in body.splitlines()
    output = capsys.readouterr()
    assert "status 401" in output.err
    assert "canary" not in output.out + output.err
    assert credentials.split()[1] not in output.out + output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-gateway", "http://ada:canary@127.0.0.1:9091"], "--push-credentials FILE"),
        (["--push-gateway", "127.0.0.1:9091"], "must be http://HOST:PORT"),
        (["--push-gateway", "ada:canary@127.0.0.1:9091"], "must be http://HOST:PORT"),
        (["--push-gateway", "http://[bad"], "http://[bad: not a valid URL"),
        (["--push-credentials", "secret"], "--push-credentials: found 'secret' without --push-gateway"),
    ],
)
def test_an_invalid_pushgateway_is_refused_without_printing_its_password(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "build", str(tmp_path), str(tmp_path / "set"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "canary" not in error

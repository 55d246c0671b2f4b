from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mcl_dist.config import build_config
from mcl_dist.errors import ConfigError, UserError
from monitoring.http.basic_auth import hashed, main
from monitoring.http.healthz import Healthz
from monitoring.http.server import Exporter, MonitoringConfig, reached_at
from monitoring.metrics.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # a thread may be at a request when its server ends


@contextmanager
def serving(stale_seconds: float = 600.0, **settings: Any) -> Iterator[Exporter]:
    registry = CollectorRegistry()
    board = Registry(["run"])
    board.set("mcl_step", 3)
    registry.register(board)
    exporter = Exporter(registry, MonitoringConfig(**settings))
    exporter.mount("/healthz", Healthz(stale_seconds), is_open=True)
    try:
        yield exporter
    finally:
        exporter.close()


def asked(exporter: Exporter, path: str, tls: ssl.SSLContext | None = None, **headers: str) -> tuple[int, str]:
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    connection = kind("127.0.0.1", exporter.port, timeout=10, **({} if tls is None else {"context": tls}))
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_metrics_are_served_on_the_loopback_and_nothing_else_is_there() -> None:
    with serving() as exporter:
        status, text = asked(exporter, "/metrics")
        assert status == 200
        assert "mcl_step 3.0" in text.splitlines()
        assert asked(exporter, "/")[0] == 404
        assert asked(exporter, "/metricsandmore")[0] == 404


def test_what_is_mounted_higher_up_answers_for_all_that_is_not_mounted_below() -> None:
    def page(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    with serving() as exporter:
        exporter.mount("/", page)
        assert asked(exporter, "/") == (200, "/")
        assert asked(exporter, "/some/thing") == (200, "/some/thing")
        assert "mcl_step" in asked(exporter, "/metrics")[1]


@pytest.mark.parametrize(("stale_seconds", "status", "word"), [(600.0, 200, "ok"), (0.0, 503, "stale")])
def test_a_process_without_a_step_for_too_long_is_not_well(stale_seconds: float, status: int, word: str) -> None:
    with serving(stale_seconds) as exporter:
        found, text = asked(exporter, "/healthz")
    assert found == status
    assert json.loads(text)["status"] == word


def test_with_a_password_file_everything_but_health_asks_for_a_password(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"# who may look\nprometheus:{hashed('right')}\n")
    with serving(password_file=str(file)) as exporter:
        for path in ("/metrics", "/nothing"):
            assert asked(exporter, path)[0] == 401
        for wrong in (basic("prometheus", "wrong"), basic("nobody", "right"), "Basic ???", "Bearer right", ""):
            assert asked(exporter, "/metrics", Authorization=wrong)[0] == 401
        for _ in range(2):  # the second time by what is remembered of the first
            assert asked(exporter, "/metrics", Authorization=basic("prometheus", "right"))[0] == 200
        assert asked(exporter, "/healthz")[0] == 200


def test_the_password_file_holds_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hushhush\n"))
    assert main(["prometheus"]) == 0
    line = capsys.readouterr().out
    assert "hushhush" not in line
    (tmp_path / "users").write_text(line)
    with serving(password_file=str(tmp_path / "users")) as exporter:
        assert asked(exporter, "/metrics", Authorization=basic("prometheus", "hushhush"))[0] == 200
    assert main(["a:b"]) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [("prometheus:hunter2\n", "line 1 is not USER:scrypt"), ("# nobody\n", "names no user"), (None, "cannot be read")],
)
def test_a_password_file_that_cannot_be_used_is_named_without_what_is_in_it(
    tmp_path: Path, text: str | None, says: str
) -> None:
    file = tmp_path / "users"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says) as raised, serving(password_file=str(file)):
        pass
    assert str(file) in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    made = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", made[0], "-keyout", made[1]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return made[0], made[1]


def test_with_a_certificate_it_speaks_tls_and_who_does_not_holds_nobody_up(certificate: tuple[str, str]) -> None:
    trusted = ssl.create_default_context(cafile=certificate[0])
    with (
        serving(tls_certificate=certificate[0], tls_key=certificate[1]) as exporter,
        socket.create_connection(("127.0.0.1", exporter.port)),  # and says nothing
    ):
        assert asked(exporter, "/metrics", trusted)[0] == 200
        with pytest.raises((http.client.HTTPException, OSError)):
            asked(exporter, "/metrics")
        assert asked(exporter, "/healthz", trusted)[0] == 200


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing.pem")
    with (
        pytest.raises(UserError, match=r"monitoring.tls_certificate.*nothing.pem"),
        serving(tls_certificate=nothing, tls_key=nothing),
    ):
        pass
    with pytest.raises(ConfigError, match=r"monitoring.tls_key: found without monitoring.tls_certificate"):
        build_config(MonitoringConfig, {"tls_key": nothing}).check()


def test_a_port_that_is_taken_is_named_and_one_that_is_none() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port}: .*monitoring.port"):
            Exporter(CollectorRegistry(), MonitoringConfig(port=port))
    with pytest.raises(UserError, match=r"127.0.0.1:65536: no such port"):
        Exporter(CollectorRegistry(), MonitoringConfig(port=65535), offset=1)


def test_others_find_a_machine_that_is_bound_to_every_address_by_its_name() -> None:
    assert reached_at("0.0.0.0") == socket.gethostname()
    assert reached_at("127.0.0.1") == "127.0.0.1"

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
from monitoring.http.basic_auth import hash_password, main
from monitoring.http.healthz import Healthz
from monitoring.http.server import MetricsServer, MonitoringConfig, advertised_host
from monitoring.metrics.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # a thread may outlive its server


@contextmanager
def serving(stale_seconds: float = 600.0, **settings: Any) -> Iterator[MetricsServer]:
    collectors = CollectorRegistry()
    registry = Registry(["run"])
    registry.set("mcl_step", 3)
    collectors.register(registry)
    server = MetricsServer(collectors, MonitoringConfig(**settings))
    server.mount("/healthz", Healthz(stale_seconds), is_public=True)
    try:
        yield server
    finally:
        server.close()


def get(server: MetricsServer, path: str, tls: ssl.SSLContext | None = None, **headers: str) -> tuple[int, str]:
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    connection = kind("127.0.0.1", server.port, timeout=10, **({} if tls is None else {"context": tls}))
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_only_metrics_are_served_on_the_loopback() -> None:
    with serving() as server:
        status, text = get(server, "/metrics")
        assert status == 200
        assert "mcl_step 3.0" in text.splitlines()
        assert get(server, "/")[0] == 404
        assert get(server, "/metricsandmore")[0] == 404


def test_an_application_serves_all_paths_below_its_prefix_except_longer_prefixes() -> None:
    def page(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    with serving() as server:
        server.mount("/", page)
        assert get(server, "/") == (200, "/")
        assert get(server, "/some/thing") == (200, "/some/thing")
        assert "mcl_step" in get(server, "/metrics")[1]


@pytest.mark.parametrize(("stale_seconds", "status", "health"), [(600.0, 200, "ok"), (0.0, 503, "stale")])
def test_healthz_answers_503_after_too_long_without_a_step(stale_seconds: float, status: int, health: str) -> None:
    with serving(stale_seconds) as server:
        found, text = get(server, "/healthz")
    assert found == status
    assert json.loads(text)["status"] == health


def test_with_a_password_file_every_path_but_healthz_needs_a_password(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"# a comment\nprometheus:{hash_password('right')}\n")
    with serving(password_file=str(file)) as server:
        for path in ("/metrics", "/nothing"):
            assert get(server, path)[0] == 401
        for wrong in (basic("prometheus", "wrong"), basic("nobody", "right"), "Basic ???", "Bearer right", ""):
            assert get(server, "/metrics", Authorization=wrong)[0] == 401
        for _ in range(2):  # the second time without hashing
            assert get(server, "/metrics", Authorization=basic("prometheus", "right"))[0] == 200
        assert get(server, "/healthz")[0] == 200


def test_the_password_file_does_not_contain_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hushhush\n"))
    assert main(["prometheus"]) == 0
    line = capsys.readouterr().out
    assert "hushhush" not in line
    (tmp_path / "users").write_text(line)
    with serving(password_file=str(tmp_path / "users")) as server:
        assert get(server, "/metrics", Authorization=basic("prometheus", "hushhush"))[0] == 200
    assert main(["a:b"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("prometheus:hunter2\n", "line 1 is not USER:scrypt"), ("# nobody\n", "no user found"), (None, "cannot be read")],
)
def test_an_unusable_password_file_is_named_without_its_content(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "users"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as raised, serving(password_file=str(file)):
        pass
    assert str(file) in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return files[0], files[1]


def test_with_a_certificate_the_server_speaks_tls_and_a_silent_client_blocks_no_other(
    certificate: tuple[str, str],
) -> None:
    trusted = ssl.create_default_context(cafile=certificate[0])
    with (
        serving(tls_certificate=certificate[0], tls_key=certificate[1]) as server,
        socket.create_connection(("127.0.0.1", server.port)),  # stays silent
    ):
        assert get(server, "/metrics", trusted)[0] == 200
        with pytest.raises((http.client.HTTPException, OSError)):
            get(server, "/metrics")
        assert get(server, "/healthz", trusted)[0] == 200


def test_an_invalid_certificate_file_is_named(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing.pem")
    with (
        pytest.raises(UserError, match=r"monitoring.tls_certificate.*nothing.pem"),
        serving(tls_certificate=nothing, tls_key=nothing),
    ):
        pass
    with pytest.raises(ConfigError, match=r"monitoring.tls_key: found without monitoring.tls_certificate"):
        build_config(MonitoringConfig, {"tls_key": nothing}).check()


def test_a_taken_and_an_invalid_port_are_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port}: .*monitoring.port"):
            MetricsServer(CollectorRegistry(), MonitoringConfig(port=port))
    with pytest.raises(UserError, match=r"127.0.0.1:65536: no such port"):
        MetricsServer(CollectorRegistry(), MonitoringConfig(port=65535), offset=1)


def test_a_wildcard_address_is_advertised_as_the_host_name() -> None:
    assert advertised_host("0.0.0.0") == socket.gethostname()
    assert advertised_host("127.0.0.1") == "127.0.0.1"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from launch.cli.main import main
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE
from mcl_dist.events import Started
from mcl_dist.run_log.listeners import EventLog
from monitoring.history.run_folder import RunFolder
from monitoring.http.basic_auth import hash_password
from monitoring.http.server import MetricsServer, MonitoringConfig
from monitoring.web.app import RunApp


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """URL of a run's first rank, which requires a password."""
    EventLog(tmp_path / "run" / "log.jsonl")(Started(0, 60, None))
    users = tmp_path / "users"
    users.touch(mode=0o600)
    users.write_text(f"ada:{hash_password('canary')}\n")
    server = MetricsServer(CollectorRegistry(), MonitoringConfig(password_file=str(users)))
    server.mount("/", RunApp(RunFolder(tmp_path / "run").view))
    yield f"http://127.0.0.1:{server.port}"
    server.close()


def credentials(folder: Path, text: str, mode: int = 0o600) -> str:
    file = folder / "credentials"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_a_remote_run_is_shown_with_the_right_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", url, "--credentials", credentials(tmp_path, "ada:canary\n")]) == 0
    assert "step 0 of 60" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "ada:wrong"])
def test_a_wrong_or_missing_password_is_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    options = ["--credentials", credentials(tmp_path, text)] if text else []
    assert main(["monitor", url, *options]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "asks for a user and password" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "mode", "message"), [("ada:canary", 0o644, "chmod 600"), ("canary", 0o600, "must hold one line")]
)
def test_unsafe_credentials_are_rejected_without_showing_them(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, mode: int, message: str
) -> None:
    assert main(["monitor", url, "--credentials", credentials(tmp_path, text, mode)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert "canary" not in error


def test_a_password_in_a_url_is_rejected_without_showing_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "http://ada:canary@127.0.0.1:1"]) == EXIT_USAGE
    assert "canary" not in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://[bad", "http://ada:canary@[bad"])
def test_an_invalid_url_is_rejected_in_one_line_without_its_password(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", url]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "[bad: not a valid URL; must be http://HOST:PORT" in error
    assert "canary" not in error
    assert error.count("\n") == 1


def test_an_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "http://127.0.0.1:1"]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert error.count("\n") == 1

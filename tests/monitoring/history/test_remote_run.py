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
from monitoring.http.basic_auth import hashed
from monitoring.http.server import Exporter, MonitoringConfig
from monitoring.web.app import Page


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A run's first rank that asks for a password."""
    EventLog(tmp_path / "run" / "log.jsonl")(Started(0, 60, None))
    users = tmp_path / "users"
    users.touch(mode=0o600)
    users.write_text(f"ada:{hashed('canary')}\n")
    exporter = Exporter(CollectorRegistry(), MonitoringConfig(password_file=str(users)))
    exporter.mount("/", Page(RunFolder(tmp_path / "run").view))
    yield f"http://127.0.0.1:{exporter.port}"
    exporter.close()


def credentials(folder: Path, text: str, mode: int = 0o600) -> str:
    file = folder / "credentials"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_a_run_at_a_url_is_shown_to_who_knows_the_password(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", url, "--credentials", credentials(tmp_path, "ada:canary\n")]) == 0
    assert "step 0 of 60" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "ada:wrong"])
def test_who_does_not_is_told_in_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    options = ["--credentials", credentials(tmp_path, text)] if text else []
    assert main(["monitor", url, *options]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "asks for a user and password" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "mode", "says"), [("ada:canary", 0o644, "chmod 600"), ("canary", 0o600, "must hold one line")]
)
def test_credentials_that_are_no_secret_are_refused_untold(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, mode: int, says: str
) -> None:
    assert main(["monitor", url, "--credentials", credentials(tmp_path, text, mode)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert says in error
    assert "canary" not in error


def test_a_password_in_a_url_is_refused_untold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "http://ada:canary@127.0.0.1:1"]) == EXIT_USAGE
    assert "canary" not in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://[bad", "http://ada:canary@[bad"])
def test_what_is_no_url_is_refused_in_one_line_without_its_password(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", url]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "[bad: no URL; must be http://HOST:PORT" in error
    assert "canary" not in error
    assert error.count("\n") == 1


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "http://127.0.0.1:1"]) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "127.0.0.1:1" in error
    assert error.count("\n") == 1

"""A command on many hosts, which are all this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest

from launch.cluster.hostfile import Host
from launch.cluster.remote_shell import RemoteShell
from launch.cluster.ssh import Ssh
from launch.supervision.outcome import HUNG, LOST, OUTCOME_LINE, Outcome

SECONDS = 20.0


class LocalSsh(Ssh):
    """Runs a host's commands on this machine."""

    def command(self, host: str, command: str) -> list[str]:  # noqa: ARG002
        return ["sh", "-c", command]


class ClosedTerminal:
    """Standard output after its terminal was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, f"cannot show {text}")

    def flush(self) -> None:
        raise OSError(5, "cannot flush")


def test_hosts_report_outcomes_and_exit_codes_and_their_output_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hung, lost = Outcome(1, HUNG, "step 9 takes 80 s"), Outcome(1, LOST, "node 1 has disconnected")
    lines = [f"'{OUTCOME_LINE} {json.dumps(asdict(outcome) | {'retry': True})}'" for outcome in (lost, hung)]
    command = f"echo output; case $node in 0) echo {lines[0]};; 1) echo {lines[1]};; esac; exit 76"
    with RemoteShell([Host("node1", 1), Host("node2", 1)], command, "ssh", LocalSsh()) as shell:
        shell.wait(SECONDS)
    assert shell.exit_codes == {"node1": 76, "node2": 76}
    assert shell.outcomes == {"node1": lost, "node2": hung}
    assert sorted(capsys.readouterr().out.splitlines()) == ["node1: output", "node2: output"]


def test_a_host_reports_its_exit_code_after_the_terminal_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedTerminal())
    with RemoteShell([Host("node1", 1)], "echo output; exit 76", "ssh", LocalSsh()) as shell:
        shell.wait(SECONDS)
    assert shell.exit_codes == {"node1": 76}

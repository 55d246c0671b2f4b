"""Commands on other hosts, over ssh: never a question, never a wait without an end."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 5, 3  # a connection that is silent for their product is given up
UNREACHABLE = 255  # ssh's own exit code, which a command that was killed has too


@dataclass(frozen=True)
class Ssh:
    """How hosts are reached; what is not given here is as ssh's own configuration says.

    Attributes:
        config: file for `ssh -F`.
        port: of the hosts' sshd.
        key: file of the private key.
    """

    config: str | None = None
    port: int | None = None
    key: str | None = None

    def options(self) -> list[str]:
        """Words between `ssh` and the host."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": ALIVE_SECONDS,
            "ServerAliveCountMax": ALIVE_COUNT,
        }
        words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        for option, value in (("-F", self.config), ("-p", self.port), ("-i", self.key)):
            words += [option, str(value)] if value is not None else []
        return words

    def command(self, host: str, command: str) -> list[str]:
        """What to start here so that a shell command runs there."""
        return ["ssh", "-a", "-x", *self.options(), host, command]


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--ssh-config`, `--ssh-port` and `--ssh-key`."""
    parser.add_argument("--ssh-config", metavar="FILE", help="for `ssh -F` (default: ~/.ssh/config)")
    parser.add_argument("--ssh-port", metavar="N", type=int, help="of the hosts' sshd")
    parser.add_argument("--ssh-key", metavar="FILE", help="private key to log in with")


def from_arguments(arguments: argparse.Namespace) -> Ssh:
    """What `add_arguments` was given."""
    return Ssh(arguments.ssh_config, arguments.ssh_port, arguments.ssh_key)


def here_but_there(words: Sequence[str], seconds: float | None = None, before: str = "") -> str:
    """A shell command that runs words in this folder with this Python, on a host that has both at the same path.

    Args:
        words: for Python.
        seconds: after which it is killed there, whether we still listen or not.
        before: what the shell is to put before them, such as `env`.
    """
    limit = ["timeout", "--signal=KILL", f"{seconds:.0f}"] if seconds else []
    command = f"{before} {shlex.join([*limit, sys.executable, *words])}"
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {command.strip()}"

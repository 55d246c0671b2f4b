"""Commands on other hosts over ssh: without prompts, with timeouts."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 5, 3  # ssh closes a connection that is silent for their product
UNREACHABLE = 255  # ssh's own exit code, also used for a local command that was killed


@dataclass(frozen=True)
class Ssh:
    """How to reach hosts; ssh's own configuration supplies what is None.

    Attributes:
        config: file for `ssh -F`.
        port: of the hosts' sshd.
        key: file of the private key.
    """

    config: str | None = None
    port: int | None = None
    key: str | None = None

    def options(self) -> list[str]:
        """Arguments between `ssh` and the host."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": ALIVE_SECONDS,
            "ServerAliveCountMax": ALIVE_COUNT,
        }
        options = [text for name, value in settings.items() for text in ("-o", f"{name}={value}")]
        for option, value in (("-F", self.config), ("-p", self.port), ("-i", self.key)):
            options += [option, str(value)] if value is not None else []
        return options

    def command(self, host: str, command: str) -> list[str]:
        """The local command that runs a shell command on a host."""
        return ["ssh", "-a", "-x", *self.options(), host, command]


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--ssh-config`, `--ssh-port` and `--ssh-key`."""
    parser.add_argument("--ssh-config", metavar="FILE", help="for `ssh -F` (default: ~/.ssh/config)")
    parser.add_argument("--ssh-port", metavar="N", type=int, help="of the hosts' sshd")
    parser.add_argument("--ssh-key", metavar="FILE", help="private key to log in with")


def from_arguments(arguments: argparse.Namespace) -> Ssh:
    """The `Ssh` that the options of `add_arguments` describe."""
    return Ssh(arguments.ssh_config, arguments.ssh_port, arguments.ssh_key)


def remote_command(arguments: Sequence[str], seconds: float | None = None, prefix: str = "") -> str:
    """A shell command that runs this Python in this folder, on a host that has both at the same paths.

    Args:
        arguments: of Python.
        seconds: after which the host kills it, even if the connection is lost.
        prefix: shell text before the command, such as `env NAME=VALUE`.
    """
    limit = ["timeout", "--signal=KILL", f"{seconds:.0f}"] if seconds else []
    command = f"{prefix} {shlex.join([*limit, sys.executable, *arguments])}"
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {command.strip()}"

"""Commands on other hosts over ssh: without prompts, with timeouts, on all hosts at once."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")
CONNECT_SECONDS = 10
ALIVE_SECONDS, ALIVE_COUNT = 5, 3  # ssh closes a connection that is silent for their product
UNREACHABLE = 255  # ssh's own exit code, also used for a local command that was killed


@dataclass(frozen=True)
class Ssh:
    """How to reach hosts; ssh's own configuration supplies what is None."""

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

    The host kills it after so many seconds, even if the connection is lost; `prefix` is shell text such as `env A=1`.
    """
    limit = ["timeout", "--signal=KILL", f"{seconds:.0f}"] if seconds else []
    command = f"{prefix} {shlex.join([*limit, sys.executable, *arguments])}"
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {command.strip()}"


class Reply(NamedTuple):
    """A command's output, "" after a timeout, its exit code, None after a timeout, and its times in Unix seconds."""

    stdout: str
    stderr: str
    exit_code: int | None
    started: float
    ended: float


def run_all(
    commands: Mapping[Key, Sequence[str]],
    timeout_seconds: float,
    inputs: Mapping[Key, str] | None = None,
    *,
    new_session: bool = False,
) -> dict[Key, Reply]:
    """Run commands at once, with these standard inputs, and kill them after the timeout; returns the replies by key.

    A new session keeps a terminal's signals from the commands.
    """

    def run(key: Key) -> Reply:
        started, text = time.time(), (inputs or {}).get(key, "")
        try:
            result = subprocess.run(
                commands[key],
                input=text,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_seconds,
                start_new_session=new_session,
            )
        except subprocess.TimeoutExpired:
            return Reply("", "", None, started, time.time())
        return Reply(result.stdout, result.stderr, result.returncode, started, time.time())

    with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))

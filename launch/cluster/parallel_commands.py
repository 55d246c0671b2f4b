"""Short commands that run at the same time, one for each host."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")


class Reply(NamedTuple):
    """The result of a command.

    Attributes:
        stdout, stderr: its output; "" if it timed out.
        exit_code: None if it timed out.
        started, ended: Unix seconds.
    """

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
    """Run all commands at once; returns their replies by the commands' keys.

    Args:
        commands: by any key.
        timeout_seconds: after which a command is killed.
        inputs: standard input of commands; none where missing.
        new_session: keep a terminal's signals from the commands.
    """
    given = inputs or {}

    def run(key: Key) -> Reply:
        started = time.time()
        try:
            result = subprocess.run(
                commands[key],
                input=given.get(key, ""),
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

"""The hosts of a run, from DeepSpeed's hostfile: one `HOST slots=N` a line."""

import re
from dataclasses import dataclass
from pathlib import Path

from mcl_dist.errors import ConfigError

LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d{0,3})")
# A name that ssh and pdsh cannot take for an option, a list of hosts or shell syntax.
NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*")
FORM = "write one `HOST slots=N` a line, N the ranks to run there"


@dataclass(frozen=True)
class Host:
    """One host of a run: its name for ssh, with or without a user, and how many ranks to run there."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str) -> tuple[Host, ...]:
    """The hosts in the file's order; the ranks meet at the first.

    Raises:
        ConfigError: the file is missing or empty, or a line (named by its number) is malformed or repeats a host.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a hostfile ({error}); {FORM}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (content := line.partition("#")[0].strip()):
            continue
        found = LINE.fullmatch(content)
        if not found or not NAME.fullmatch(found["name"]):
            raise ConfigError(f"{path}: line {number}: found {content[:80]!r}; {FORM}")
        if found["name"] in hosts:
            raise ConfigError(f"{path}: line {number}: {found['name']} is named twice; give it one line with all slots")
        hosts[found["name"]] = Host(found["name"], int(found["slots"]))
    if not hosts:
        raise ConfigError(f"{path}: names no host; {FORM}")
    return tuple(hosts.values())

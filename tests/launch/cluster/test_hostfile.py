"""Hostfiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cluster.hostfile import read_hostfile
from mcl_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 is named twice"),
        ("# hosts\nnode1\n", "line 2: found 'node1'"),
        ("node1 slots=0\n", "line 1: found 'node1 slots=0'"),
        ("-oProxyCommand=x slots=1\n", "line 1: found '-oProxyCommand"),
        ("\n# none\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hostfile(str(hostfile))


def test_a_hostfile_names_hosts_with_their_slots(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=8  # the first\n\nuser@node2   slots=4\n")
    assert [(host.name, host.address, host.slots) for host in read_hostfile(str(hostfile))] == [
        ("node1", "node1", 8),
        ("user@node2", "node2", 4),
    ]

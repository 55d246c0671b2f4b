"""What `mcl doctor` finds on nodes that are all this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli.doctor import Diagnostics
from launch.cluster import doctor_checks
from launch.cluster.doctor_checks import FAIL, Row
from launch.cluster.doctor_node import answer
from launch.cluster.hostfile import Host
from launch.cluster.ssh import Ssh
from launch.run.config import PretrainConfig
from mcl_dist.config import load_config
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")


def config(work: Path, *more: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIG, [f"data.train={work}/shards", f"run.dir={work}/run", *more])


def failing(rows: Sequence[Row], check: str) -> dict[str, Row]:
    return {row.node: row for row in rows if row.check == check and row.state == FAIL}


class Here(Ssh):
    """Runs what is for a host on this machine; `localhost` finds no torch there that can be imported."""

    def command(self, host: str, command: str) -> list[str]:
        settings = {"localhost": f"export PYTHONPATH={self.config}; "}
        return ["sh", "-c", settings.get(host, "") + command]


def test_a_node_without_torch_is_told_so_and_all_else_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    hosts = [Host("localhost", 1), Host("127.0.0.1", 1)]
    rows = Diagnostics(hosts, Here(config=str(tmp_path)), config(tmp_path), None, seconds=60.0).rows()
    assert failing(rows, "reached") == {}
    (told,) = failing(rows, "import torch").values()
    assert (told.node, told.found) == ("localhost", "OSError: libcudart.so.13: cannot open shared object file")
    assert "install torch anew" in told.remedy
    said = {row.check: row for row in rows}
    assert said["all-reduce"].found.startswith("one rank by gloo")
    assert said["data"].node == "127.0.0.1"
    assert said["shared checkpoints"].found.endswith("is one folder for all")
    assert not list(tmp_path.rglob(".mcl-doctor*"))


def ports(work: Path, hosts: Sequence[Host], *more: str) -> dict[str, Row]:
    """Rows of ports that cannot be had, by node."""
    examination = Diagnostics(hosts, Ssh(), config(work, *more), None, seconds=1.0)
    nodes = {host.name: answer(examination._request(host.name)) for host in hosts}
    return failing(list(doctor_checks.rows(nodes, {host.name: host.slots for host in hosts}, {})), "ports")


def test_the_monitoring_ports_of_all_ranks_are_tried_on_every_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = ports(tmp_path, [Host("node1", 1), Host("node2", 2)], f"monitoring.port={port - 1}")
    assert list(found) == ["node2"]
    assert found["node2"].found == f"127.0.0.1:{port} Address already in use"


def test_a_port_that_is_too_high_for_the_last_rank_is_told(tmp_path: Path) -> None:
    (row,) = ports(tmp_path, [Host("node1", 2)], "monitoring.port=65535").values()
    assert row.found == "127.0.0.1:65536 no such port"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_a_port_of_an_ipv6_address_is_closed_only_where_something_listens(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        settings = ["monitoring.address='::1'", f"monitoring.port={server.getsockname()[1]}"]
        assert ports(tmp_path, [Host("node1", 1)], *settings)
    assert not ports(tmp_path, [Host("node1", 1)], *settings)

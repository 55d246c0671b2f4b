"""Diagnostics of nodes that are all this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cluster.doctor_checks import FAIL, CheckResult, check_nodes
from launch.cluster.doctor_diagnostics import Diagnostics
from launch.cluster.doctor_node import collect_facts
from launch.cluster.hostfile import Host
from launch.cluster.ssh import Ssh
from launch.run.config import PretrainConfig
from mcl_dist.config import load_config
from tests.support.paths import REPOSITORY

CONFIG = str(REPOSITORY / "configs" / "pretrain" / "tiny.yaml")


def config(work: Path, *more: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIG, [f"data.train={work}/shards", f"run.dir={work}/run", *more])


def failures(rows: Sequence[CheckResult], check: str) -> dict[str, CheckResult]:
    return {row.node: row for row in rows if row.check == check and row.state == FAIL}


class LocalSsh(Ssh):
    """Runs a host's commands on this machine; `localhost` cannot import torch."""

    def command(self, host: str, command: str) -> list[str]:
        prefix = f"export PYTHONPATH={self.config}; " if host == "localhost" else ""
        return ["sh", "-c", prefix + command]


@pytest.mark.slow
def test_a_node_without_torch_is_reported_and_the_other_checks_run(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    hosts = [Host("localhost", 1), Host("127.0.0.1", 1)]
    rows = Diagnostics(hosts, LocalSsh(config=str(tmp_path)), config(tmp_path), None, seconds=60.0).run()
    assert failures(rows, "reached") == {}
    (row,) = failures(rows, "import torch").values()
    assert (row.node, row.found) == ("localhost", "OSError: libcudart.so.13: cannot open shared object file")
    assert "reinstall torch" in row.remedy
    by_check = {row.check: row for row in rows}
    assert by_check["all-reduce"].found.startswith("one rank over gloo")
    assert by_check["data"].node == "127.0.0.1"
    assert by_check["shared checkpoints"].found.endswith("is one folder for all")
    assert not list(tmp_path.rglob(".mcl-doctor*"))


def closed_ports(work: Path, hosts: Sequence[Host], *more: str) -> dict[str, CheckResult]:
    """Failing rows of ports, by node."""
    diagnostics = Diagnostics(hosts, Ssh(), config(work, *more), None, seconds=1.0)
    nodes = {host.name: collect_facts(diagnostics.node_request(host.name)) for host in hosts}
    return failures(list(check_nodes(nodes, {host.name: host.slots for host in hosts}, {})), "ports")


def test_the_monitoring_ports_of_all_ranks_are_checked_on_every_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        closed = closed_ports(tmp_path, [Host("node1", 1), Host("node2", 2)], f"monitoring.port={port - 1}")
    assert list(closed) == ["node2"]
    assert closed["node2"].found == f"127.0.0.1:{port} Address already in use"


def test_a_port_that_is_too_high_for_the_last_rank_is_reported(tmp_path: Path) -> None:
    (row,) = closed_ports(tmp_path, [Host("node1", 2)], "monitoring.port=65535").values()
    assert row.found == "127.0.0.1:65536 no such port"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_a_port_of_an_ipv6_address_is_closed_only_while_a_server_listens(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        settings = ["monitoring.address='::1'", f"monitoring.port={server.getsockname()[1]}"]
        assert closed_ports(tmp_path, [Host("node1", 1)], *settings)
    assert not closed_ports(tmp_path, [Host("node1", 1)], *settings)

"""Supervisors of two nodes start and end attempts together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.supervision.deepspeed_launcher import free_port
from launch.supervision.outcome import DONE, KILLED, LOST, Outcome
from launch.supervision.processes import wait_until
from launch.supervision.rendezvous import RendezvousClient, RendezvousServer

TIMEOUT_SECONDS = 10.0
Nodes = tuple[RendezvousClient, RendezvousClient]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    port = free_port()
    server = RendezvousServer(port, 2, TIMEOUT_SECONDS)
    first, second = (RendezvousClient("127.0.0.1", port, node, 2, TIMEOUT_SECONDS) for node in range(2))
    yield first, second
    first.close()
    second.close()
    server.close()


def start_attempt(nodes: Nodes) -> None:
    first, second = nodes
    first.set_ready()
    second.set_ready()
    port = wait_until(first.join_attempt, TIMEOUT_SECONDS)
    assert port == wait_until(second.join_attempt, TIMEOUT_SECONDS) > 0


@pytest.mark.slow
def test_a_node_that_only_lost_the_others_learns_the_root_cause(nodes: Nodes) -> None:
    first, second = nodes
    killed, lost = Outcome(1, KILLED, "rank 1 was killed by SIGKILL"), Outcome(1, LOST, "rank 0: another rank is gone")
    for root_cause in (None, killed):
        start_attempt(nodes)
        assert first.root_cause == second.root_cause == root_cause
        first.report_outcome(lost)
        assert wait_until(second.failure_elsewhere, TIMEOUT_SECONDS) == lost
        second.report_outcome(killed)


@pytest.mark.slow
def test_nodes_start_at_one_port_share_a_failure_restart_and_finish(nodes: Nodes) -> None:
    first, second = nodes
    killed, done = Outcome(1, KILLED, "rank 3 was killed by SIGKILL"), Outcome(0, DONE, "all is done")
    for _ in range(2):
        start_attempt(nodes)
        second.report_outcome(killed)
        assert wait_until(first.failure_elsewhere, TIMEOUT_SECONDS) == killed
        first.report_outcome(killed)
    start_attempt(nodes)
    second.report_outcome(done)
    assert first.failure_elsewhere() is None
    first.report_outcome(done)

"""How supervisors of two nodes begin and end attempts together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from launch.supervision.deepspeed_launcher import free_port
from launch.supervision.outcome import Outcome
from launch.supervision.rendezvous import RendezvousClient, RendezvousServer

Answer = TypeVar("Answer")
PATIENCE = 10.0


def awaited(ask: Callable[[], Answer]) -> Answer:
    deadline = time.monotonic() + PATIENCE
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return answer


def test_a_node_that_only_missed_others_learns_what_ended_the_attempt() -> None:
    port = free_port()
    host = RendezvousServer(port, 2, PATIENCE)
    first, second = (RendezvousClient("127.0.0.1", port, node, 2, PATIENCE) for node in range(2))
    killed, missed = Outcome(1, "killed", "rank 1 was ended by SIGKILL"), Outcome(1, "lost", "rank 0: a rank has gone")
    for before in (None, killed):
        first.ready()
        second.ready()
        assert awaited(first.begun) == awaited(second.begun) > 0
        assert first.before == second.before == before
        first.ended(missed)
        assert awaited(lambda: second.news(pauses=False)) == missed
        second.ended(killed)
    first.close()
    second.close()
    host.close()


def test_nodes_begin_at_one_port_hear_of_a_failure_begin_again_and_finish() -> None:
    port = free_port()
    host = RendezvousServer(port, 2, PATIENCE)
    first, second = (RendezvousClient("127.0.0.1", port, node, 2, PATIENCE) for node in range(2))
    killed, done = Outcome(1, "killed", "rank 3 was ended by SIGKILL"), Outcome(0, "done", "all is done")
    for _ in range(2):
        first.ready()
        second.ready()
        assert awaited(first.begun) == awaited(second.begun) > 0
        second.ended(killed)
        assert awaited(lambda: first.news(pauses=False)) == killed
        first.ended(killed)
    first.ready()
    second.ready()
    assert awaited(first.begun) == awaited(second.begun) > 0
    second.ended(done)
    assert first.news(pauses=False) is None
    first.ended(done)
    first.close()
    second.close()
    host.close()

"""When a rank counts as hanging."""

from __future__ import annotations

import os

from launch.supervision.hang_detection import SuperviseConfig, find_hang
from mcl_dist.distributed.heartbeat import STEPPING, WAITING, Beat

LIMITS = SuperviseConfig(hang_factor=10, hang_seconds_min=5, silent_seconds=3, pause_seconds=500)
NOW = 100.0


def beat(
    rank: int,
    phase: str = STEPPING,
    since: float = 0.0,
    written_at: float = NOW,
    median_step_seconds: float | None = 0.1,
) -> Beat:
    return Beat(rank, os.getpid(), 7, phase, since, written_at, median_step_seconds)


def test_a_step_that_takes_many_times_the_median_is_a_hang() -> None:
    assert find_hang([beat(0, since=96)], LIMITS, NOW) is None
    assert "rank 0 has been stepping" in str(find_hang([beat(0, since=94)], LIMITS, NOW))
    assert find_hang([beat(0, since=94, median_step_seconds=1.0)], LIMITS, NOW) is None


def test_a_rank_in_a_slow_phase_excuses_the_others_but_not_a_missing_heartbeat() -> None:
    assert find_hang([beat(0), beat(1, WAITING)], LIMITS, NOW) is None
    assert find_hang([beat(0)], LIMITS, NOW, others_in_slow_phase=True) is None
    assert "rank 1 has sent no heartbeat" in str(find_hang([beat(0), beat(1, WAITING, written_at=96)], LIMITS, NOW))

"""Checks of `mcl doctor` on given facts."""

from __future__ import annotations

from launch.cluster.doctor_checks import OK, check_all_reduce


def test_the_all_reduce_of_one_rank_reports_no_speed() -> None:
    answers = {"here": [{"error": "", "seconds": 0.0, "bytes_per_second": 0.0}]}
    (row,) = check_all_reduce(answers, num_ranks=1, on_gpus=False)
    assert (row.state, row.found) == (OK, "one rank over gloo: it starts, and has no peer to measure")

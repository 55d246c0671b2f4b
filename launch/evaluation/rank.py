"""One rank of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.evaluation.job import Job
from launch.evaluation.score_report import print_scores, print_scores_once
from launch.supervision.deepspeed_launcher import read_start_info, start_rank_watch, stop_with_parent

if TYPE_CHECKING:
    from launch.run.parts import RankContext
    from mcl_dist.distributed.process_group import ProcessGroup

PROBE_SECONDS = 86400.0  # timeout of the ranks that wait for the first to fit its probe; a rank that dies ends them all


def evaluate(job: Job, group: ProcessGroup) -> None:
    """Evaluate all splits by a protocol on frozen features; the first rank prints the scores."""
    from launch.evaluation.frozen_protocols import evaluate_frozen

    config = job.frozen_config()
    splits = []
    for train, test in zip(job.train, job.test, strict=True):
        scores = evaluate_frozen(job.encoder_under_test(), train, test, config, group)
        if scores is not None:
            splits.append(scores)
    if group.is_first:
        print_scores(job, splits, config)


def run_frozen_rank(job: Job) -> None:
    """Run this rank of a protocol on frozen features."""
    from mcl_dist.distributed.process_group import ProcessGroup, set_collective_timeout
    from mcl_dist.distributed.shutdown import StopRequest
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_parent(StopRequest(), seconds=0)
    device = pick_device()
    join_process_group(device)
    set_collective_timeout(PROBE_SECONDS)
    group = ProcessGroup(device)
    evaluate(job, group)
    group.barrier()


def training_rank_work(job: Job) -> Callable[[], bool]:
    """Start watching this rank of a training protocol; return the function that runs it, False after a stop request."""
    stop, heartbeat = start_rank_watch()

    def work() -> bool:
        start_info = read_start_info()
        from launch.run.parts import RankContext
        from mcl_dist.distributed.process_group import ProcessGroup
        from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

        stop_with_parent(stop)
        device = pick_device()
        join_process_group(device)
        return _train_and_test_splits(job, RankContext(ProcessGroup(device), stop, heartbeat, start_info))

    return work


def _train_and_test_splits(job: Job, rank: RankContext) -> bool:
    """Run a training protocol on all splits and print the scores; False after a stop request."""
    from launch.evaluation.training_protocols import train_and_test

    config = job.training_config(rank.group.size)
    splits = []
    for number, (train, test) in enumerate(zip(job.train, job.test, strict=True), start=1):
        split_config = config if len(job.train) == 1 else config.in_subfolder(f"split-{number}")
        result = train_and_test(job.encoder_under_test(), train, test, split_config, rank)
        if not result.is_done:
            return False
        splits += [result.scores] if result.scores else []
    if rank.group.is_first:
        print_scores_once(job, splits, config)
    return True

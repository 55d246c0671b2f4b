"""One rank of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launch.evaluation.job import Job
from launch.evaluation.score_report import tell, tell_once
from launch.supervision.deepspeed_launcher import this_birth, watched_rank

if TYPE_CHECKING:
    from mcl_dist.distributed.process_group import ProcessGroup

PROBE_SECONDS = 86400.0  # that ranks wait for the first to fit its probe; one that dies ends them all at once


def evaluate(job: Job, group: ProcessGroup) -> None:
    """All splits of a job, and on the first rank what comes of them, printed."""
    from launch.evaluation.frozen_protocols import evaluate_frozen

    settings = job.frozen()
    splits = []
    for train, test in zip(job.train, job.test, strict=True):
        scores = evaluate_frozen(job.subject(), train, test, settings, group)
        if scores is not None:
            splits.append(scores)
    if group.is_first:
        tell(job, splits, settings)


def evaluate_as_rank(job: Job) -> None:
    """Run this rank's part of a protocol on frozen features."""
    from launch.supervision.parent_watch import stop_with_launcher
    from mcl_dist.distributed.process_group import ProcessGroup, limit_waiting
    from mcl_dist.distributed.shutdown import StopRequest
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_launcher(StopRequest(), seconds=0)
    device = pick_device()
    join_process_group(device)
    limit_waiting(PROBE_SECONDS)
    group = ProcessGroup(device)
    evaluate(job, group)
    group.barrier()


def supervised_work(job: Job) -> Callable[[], bool]:
    """One rank's part in a protocol that trains, all splits; False where it was asked to stop."""
    stop, heartbeat = watched_rank()

    def work() -> bool:
        birth = this_birth()
        from launch.evaluation.training_protocols import RankContext, evaluate_supervised
        from launch.supervision.parent_watch import stop_with_launcher
        from mcl_dist.distributed.process_group import ProcessGroup
        from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

        stop_with_launcher(stop)
        device = pick_device()
        join_process_group(device)
        group = ProcessGroup(device)
        config = job.supervised(group.size)
        splits = []
        for number, (train, test) in enumerate(zip(job.train, job.test, strict=True), start=1):
            of_split = config if len(job.train) == 1 else config.below(f"split-{number}")
            outcome = evaluate_supervised(
                job.subject(), train, test, of_split, RankContext(group, stop, heartbeat, birth)
            )
            if not outcome.is_done:
                return False
            splits += [outcome.scores] if outcome.scores else []
        if group.is_first:
            tell_once(job, splits, config)
        return True

    return work

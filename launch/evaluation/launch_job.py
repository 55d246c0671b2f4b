"""Run an evaluation: in this process, over several ranks, or supervised."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from launch.evaluation.encoder_under_test import load_pretrain_config, resolve_checkpoint
from launch.evaluation.job import TRAINING_PROTOCOLS, Job
from launch.evaluation.rank import evaluate
from launch.supervision.deepspeed_launcher import NodeSpec, launch_ranks
from mcl_dist.errors import EXIT_FAILURE, EXIT_USAGE, UserError

SCRIPT = Path(__file__).parents[1] / "evaluate.py"  # started once for each rank


def run_job(job: Job, num_ranks: int) -> int:
    """Run an evaluation over ranks of this machine; return the exit code.

    Raises:
        UserError: the checkpoint or a set cannot be used, or a rank was killed.
        ConfigError: the configuration is wrong; it is checked before any rank starts.
    """
    if job.protocol in TRAINING_PROTOCOLS:
        return _supervise_ranks(job, num_ranks)
    job.frozen_config()  # reports mistakes before ranks start
    job = replace(job, evaluated=resolve_checkpoint(job.checkpoint))
    if num_ranks > 1:
        return _launch_ranks(job, num_ranks)
    import torch

    from mcl_dist.distributed.process_group import ProcessGroup

    evaluate(job, ProcessGroup(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return 0


def _launch_ranks(job: Job, num_ranks: int) -> int:
    code = launch_ranks(str(SCRIPT), [json.dumps(asdict(job))], num_ranks)
    if code not in (0, EXIT_FAILURE, EXIT_USAGE):  # a rank that exits by itself prints its error and exits with these
        raise UserError(f"a rank was killed (exit code {code}), perhaps for lack of memory; use fewer --ranks")
    return code


def _supervise_ranks(job: Job, num_ranks: int) -> int:
    from launch.supervision.supervisor import supervise_node

    config = job.training_config(num_ranks)
    if job.pretrain is not None:
        load_pretrain_config(job.pretrain, job.pretrain_overrides)  # reports mistakes before ranks start
    job = replace(job, evaluated=resolve_checkpoint(job.checkpoint))
    event_log = Path(config.run.dir) / "log.jsonl"
    return supervise_node(SCRIPT, [json.dumps(asdict(job))], NodeSpec(num_ranks), config.supervise, event_log)

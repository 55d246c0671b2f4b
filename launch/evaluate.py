"""The script of one evaluation rank; `mcl evaluate` starts it through the DeepSpeed launcher."""

import argparse
import json
from collections.abc import Sequence
from typing import NoReturn

from launch.evaluation.job import TRAINING_PROTOCOLS, Job
from launch.evaluation.rank import run_frozen_rank, training_rank_work
from launch.supervision.deepspeed_launcher import run_as_rank


def main(command_line: Sequence[str] | None = None) -> NoReturn:
    """Run one rank."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="One rank of an evaluation.")
    parser.add_argument("job", help="the Job as JSON")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args(command_line)
    job = Job(**json.loads(arguments.job))
    run_as_rank(training_rank_work(job) if job.protocol in TRAINING_PROTOCOLS else lambda: run_frozen_rank(job))


if __name__ == "__main__":
    main()

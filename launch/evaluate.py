"""The script that the DeepSpeed launcher starts once a rank of `mcl evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import NoReturn

from launch.evaluation.job import SUPERVISED, Job
from launch.evaluation.rank import evaluate_as_rank, supervised_work
from launch.supervision.deepspeed_launcher import as_rank


def main(words: Sequence[str] | None = None) -> NoReturn:
    """One rank, started by the DeepSpeed launcher."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="One rank of an evaluation.")
    parser.add_argument("job", help="JSON")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args(words)
    job = Job(**json.loads(arguments.job))
    as_rank(supervised_work(job) if job.protocol in SUPERVISED else lambda: evaluate_as_rank(job))


if __name__ == "__main__":
    main()

"""The script that the DeepSpeed launcher starts once a rank; `mcl pretrain` and bare `deepspeed` both start it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from launch.pretraining.rank import add_config_arguments, pretrain
from launch.supervision.deepspeed_launcher import as_rank, watched_rank


def main(words: Sequence[str] | None = None) -> NoReturn:
    """One rank, started by the DeepSpeed launcher."""
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="One rank of a pre-training run.")
    add_config_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_intermixed_args(words)  # `deepspeed` hands over words as they were given
    stop, heartbeat = watched_rank()
    as_rank(lambda: pretrain(arguments.config, arguments.overrides, stop, heartbeat))


if __name__ == "__main__":
    main()

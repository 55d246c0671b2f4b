"""The script of one pre-training rank; `mcl pretrain` and plain `deepspeed` start it through the DeepSpeed launcher."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from launch.pretraining.rank import add_config_arguments, pretrain
from launch.supervision.deepspeed_launcher import run_as_rank, start_rank_watch


def main(command_line: Sequence[str] | None = None) -> NoReturn:
    """Run one rank."""
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="One rank of a pre-training run.")
    add_config_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    # `deepspeed` passes its arguments on in the user's order, so overrides may stand between options.
    arguments = parser.parse_intermixed_args(command_line)
    stop, heartbeat = start_rank_watch()
    run_as_rank(lambda: pretrain(arguments.config, arguments.overrides, stop, heartbeat))


if __name__ == "__main__":
    main()

"""Pre-training: `mcl pretrain` starts the DeepSpeed launcher, which starts this file once a rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from launch.local_ranks import as_rank, launch_ranks

EXAMPLE = """example:
  mcl pretrain --config configs/pretrain/ucf101.yaml --ranks 4 data.train=s3://bucket/ucf101 run.dir=runs/ucf101
  deepspeed --num_gpus 4 launch/pretrain.py --config configs/pretrain/ucf101.yaml data.train=s3://bucket/ucf101
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl pretrain`."""
    parser = commands.add_parser(
        "pretrain",
        help="pre-train an encoder on a shard set",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    parser.add_argument("--ranks", type=int, help="processes on this machine (default: its GPUs, or 1 without any)")
    parser.set_defaults(run=launch)


def launch(arguments: argparse.Namespace) -> int:
    """Check the configuration, then hand over to the DeepSpeed launcher; returns its exit code."""
    import torch

    from launch.settings import PretrainConfig, check
    from mcl_dist.config import load_config

    num_ranks = arguments.ranks or torch.cuda.device_count() or 1
    check(load_config(PretrainConfig, arguments.config, arguments.overrides), num_ranks)
    return launch_ranks(__file__, ["--config", arguments.config, *arguments.overrides], num_ranks)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, for example configs/pretrain/kinetics400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. train.epochs=10")


def main(words: Sequence[str] | None = None) -> NoReturn:
    """One rank, started by the DeepSpeed launcher."""
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="One rank of a pre-training run.")
    _add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args(words)
    as_rank(lambda: pretrain(arguments.config, arguments.overrides))


def pretrain(config_path: str, overrides: Sequence[str]) -> None:
    """Run this rank's part of the training from the newest checkpoint, or from the start, to the end."""
    from launch.assembly import assembled
    from launch.settings import PretrainConfig, check
    from launch.supervise import end_with_launcher, only_run
    from mcl_dist.config import load_config
    from mcl_dist.engine import join_process_group, pick_device
    from mcl_dist.ranks import Ranks

    end_with_launcher()
    config = load_config(PretrainConfig, config_path, overrides)
    device = pick_device()
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    join_process_group(device)
    ranks = Ranks(device)
    alone = only_run(Path(config.run.dir)) if ranks.is_first else nullcontext()
    with alone, assembled(config, ranks, device) as trainer:
        trainer.fit()
        ranks.barrier()


if __name__ == "__main__":
    main()

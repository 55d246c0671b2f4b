"""`mcl pretrain`: check the configuration, then supervise the ranks of this node or of all nodes."""

import argparse
from pathlib import Path

from launch.cli.command import Commands, add_command
from launch.cluster import hostfile_run
from launch.pretraining.rank import add_config_arguments
from launch.supervision.node_discovery import add_node_arguments, node_spec_of

SCRIPT = Path(__file__).parents[1] / "pretrain.py"  # of one rank
EXAMPLE = """example:
  mcl pretrain --config configs/pretrain/ucf101.yaml --ranks 4 data.train=s3://bucket/ucf101 run.dir=runs/ucf101
  deepspeed --num_gpus 4 launch/pretrain.py --config configs/pretrain/ucf101.yaml data.train=s3://bucket/ucf101
"""


def register(commands: Commands) -> None:
    """Add `mcl pretrain`."""
    parser = add_command(commands, "pretrain", run, help="pre-train an encoder on a shard set", example=EXAMPLE)
    add_config_arguments(parser)
    add_node_arguments(parser)
    hostfile_run.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the configuration, then supervise the run; returns the exit code."""
    if arguments.hostfile:
        return hostfile_run.run(arguments)
    from launch.run.config import PretrainConfig, check
    from launch.supervision.supervisor import supervise_node
    from mcl_dist.config import load_config

    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    node_spec = node_spec_of(arguments)
    check(config, node_spec.num_ranks * node_spec.num_nodes)
    return supervise_node(
        SCRIPT,
        ["--config", arguments.config, *arguments.overrides],
        node_spec,
        config.supervise,
        Path(config.run.dir) / "log.jsonl",
        runtime=arguments.runtime,
        attached=arguments.attached,
    )

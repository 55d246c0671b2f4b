"""`mcl pretrain`: checks the configuration, then supervises the ranks of this node or of all nodes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from launch.cluster import controller as cluster
from launch.pretraining.rank import add_config_arguments
from launch.supervision.node_discovery import add_node_arguments, meeting_of
from launch.supervision.outcome import OUTCOME_LINE

SCRIPT = Path(__file__).parents[1] / "pretrain.py"  # of one rank
EXIT_AGAIN = 76  # to whoever launched this node with --attached: it failed, and another attempt may go better
PID_FILE, OUTCOME_FILE = "supervisor.pid", "outcome.json"
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
    add_config_arguments(parser)
    add_node_arguments(parser)
    cluster.add_arguments(parser)
    parser.set_defaults(run=launch)


def launch(arguments: argparse.Namespace) -> int:
    """Check the configuration, then supervise this node's ranks; returns the exit code."""
    if arguments.hostfile:
        return cluster.run(arguments)
    from launch.run.config import PretrainConfig, check
    from launch.supervision.rendezvous import RendezvousClient, RendezvousServer
    from launch.supervision.supervisor import Supervisor
    from mcl_dist.config import load_config

    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    meeting = meeting_of(arguments)
    check(config, meeting.num_ranks * meeting.nodes)
    with ExitStack() as stack:
        runtime = Path(arguments.runtime or stack.enter_context(tempfile.TemporaryDirectory(prefix="mcl-")))
        runtime.mkdir(parents=True, exist_ok=True)
        (runtime / PID_FILE).write_text(str(os.getpid()))
        member = None
        if meeting.nodes > 1:
            patience = config.supervise.node_seconds
            if meeting.node == 0:
                stack.callback(RendezvousServer(meeting.port, meeting.nodes, patience).close)
            member = RendezvousClient(meeting.address, meeting.port, meeting.node, meeting.nodes, patience)
            stack.callback(member.close)
        end = Supervisor(
            script=str(SCRIPT),
            words=["--config", arguments.config, *arguments.overrides],
            meeting=meeting,
            limits=config.supervise,
            runtime=runtime,
            log=Path(config.run.dir) / "log.jsonl",
            member=member,
            attached=arguments.attached,
        ).run()
        outcome = json.dumps({**asdict(end), "retry": end.may_be_mended, "node": meeting.node})
        (runtime / OUTCOME_FILE).write_text(outcome)
        if arguments.attached:
            with suppress(OSError):
                print(OUTCOME_LINE, outcome, flush=True)
            return EXIT_AGAIN if end.may_be_mended else end.exit_code
    return end.exit_code

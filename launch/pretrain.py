"""Pre-training: `mcl pretrain` supervises the DeepSpeed launcher, which starts this file once a rank."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from launch import cluster
from launch.ends import OUTCOME_LINE
from launch.local_ranks import as_rank, heed_stop_file, this_birth, watched_rank
from launch.nodes import add_node_arguments, meeting_of
from mcl_dist.distributed.heartbeat import EVALUATING, Heartbeat
from mcl_dist.distributed.shutdown import StopRequest

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
    _add_arguments(parser)
    add_node_arguments(parser)
    cluster.add_arguments(parser)
    parser.set_defaults(run=launch)


def launch(arguments: argparse.Namespace) -> int:
    """Check the configuration, then supervise this node's ranks; returns the exit code."""
    if arguments.hostfile:
        return cluster.run(arguments)
    from launch.rendezvous import Host, Member
    from launch.settings import PretrainConfig, check
    from launch.supervise import Supervisor
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
                stack.callback(Host(meeting.port, meeting.nodes, patience).close)
            member = Member(meeting.address, meeting.port, meeting.node, meeting.nodes, patience)
            stack.callback(member.close)
        end = Supervisor(
            script=__file__,
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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, for example configs/pretrain/kinetics400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. train.epochs=10")


def main(words: Sequence[str] | None = None) -> NoReturn:
    """One rank, started by the DeepSpeed launcher."""
    parser = argparse.ArgumentParser(prog="launch/pretrain.py", description="One rank of a pre-training run.")
    _add_arguments(parser)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_intermixed_args(words)  # `deepspeed` hands over words as they were given
    stop, heartbeat = watched_rank()
    as_rank(lambda: pretrain(arguments.config, arguments.overrides, stop, heartbeat))


def pretrain(config_path: str, overrides: Sequence[str], stop: StopRequest, heartbeat: Heartbeat) -> bool:
    """Run this rank's part of the training from the newest checkpoint to the end; False if it was asked to stop."""
    birth = this_birth()
    from launch.assembly import assembled
    from launch.orphans import stop_with_launcher
    from launch.report import report_at_the_end
    from launch.run_lock import only_run
    from launch.settings import PretrainConfig, check
    from mcl_dist.config import load_config
    from mcl_dist.distributed.process_group import Ranks
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_launcher(stop)
    config = load_config(PretrainConfig, config_path, overrides)
    stop_file = heed_stop_file(Path(config.run.dir), stop, heartbeat)
    device = pick_device()
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    join_process_group(device)
    ranks = Ranks(device)
    alone = only_run(Path(config.run.dir)) if ranks.is_first else nullcontext()
    with alone:
        with assembled(config, ranks, device, stop, heartbeat, birth) as trainer:
            is_done = trainer.fit()
            ranks.barrier()
            if not is_done:
                stop_file.unlink(missing_ok=True)
        if is_done and ranks.is_first and config.run.report:
            heartbeat.enters(EVALUATING)
            report_at_the_end(config.run.dir)
    return is_done


if __name__ == "__main__":
    main()

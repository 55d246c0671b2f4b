"""One rank of a pre-training run."""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from launch.supervision.deepspeed_launcher import read_start_info, stop_with_parent, watch_stop_file
from mcl_dist.distributed.heartbeat import EVALUATING, Heartbeat
from mcl_dist.distributed.shutdown import StopRequest


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that the command and its ranks share."""
    parser.add_argument("--config", required=True, help="YAML file, for example configs/pretrain/kinetics400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. train.epochs=10")


def pretrain(config_path: str, overrides: Sequence[str], stop: StopRequest, heartbeat: Heartbeat) -> bool:
    """Train on this rank from the newest checkpoint to the last step; return False after a stop request.

    Raises:
        UserError: the configuration, the set, the checkpoint or the run folder cannot be used.
    """
    start_info = read_start_info()
    from launch.pretraining.compose import compose_trainer
    from launch.report.run_report import write_final_report
    from launch.run.config import PretrainConfig, check
    from launch.run.parts import RankContext
    from launch.run.run_lock import hold_run_lock
    from mcl_dist.config import load_config
    from mcl_dist.distributed.process_group import ProcessGroup
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_parent(stop)
    config = load_config(PretrainConfig, config_path, overrides)
    stop_file = watch_stop_file(Path(config.run.dir), stop, heartbeat)
    device = pick_device()
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    join_process_group(device)
    group = ProcessGroup(device)
    with hold_run_lock(Path(config.run.dir)) if group.is_first else nullcontext():
        with compose_trainer(config, RankContext(group, stop, heartbeat, start_info)) as trainer:
            is_done = trainer.fit()
            group.barrier()
            if not is_done:
                stop_file.unlink(missing_ok=True)
        if is_done and group.is_first and config.run.report:
            heartbeat.enter_phase(EVALUATING)
            write_final_report(config.run.dir)
    return is_done

"""One rank of a pre-training run, from the newest checkpoint to the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from launch.supervision.deepspeed_launcher import heed_stop_file, this_birth
from mcl_dist.distributed.heartbeat import EVALUATING, Heartbeat
from mcl_dist.distributed.shutdown import StopRequest


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command and each of its ranks take alike."""
    parser.add_argument("--config", required=True, help="YAML file, for example configs/pretrain/kinetics400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file, e.g. train.epochs=10")


def pretrain(config_path: str, overrides: Sequence[str], stop: StopRequest, heartbeat: Heartbeat) -> bool:
    """Run this rank's part of the training from the newest checkpoint to the end; False if it was asked to stop."""
    birth = this_birth()
    from launch.pretraining.compose import assembled
    from launch.report.run_report import report_at_the_end
    from launch.run.config import PretrainConfig, check
    from launch.run.run_lock import only_run
    from launch.supervision.parent_watch import stop_with_launcher
    from mcl_dist.config import load_config
    from mcl_dist.distributed.process_group import ProcessGroup
    from mcl_dist.training.deepspeed_engine import join_process_group, pick_device

    stop_with_launcher(stop)
    config = load_config(PretrainConfig, config_path, overrides)
    stop_file = heed_stop_file(Path(config.run.dir), stop, heartbeat)
    device = pick_device()
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    join_process_group(device)
    group = ProcessGroup(device)
    alone = only_run(Path(config.run.dir)) if group.is_first else nullcontext()
    with alone:
        with assembled(config, group, device, stop, heartbeat, birth) as trainer:
            is_done = trainer.fit()
            group.barrier()
            if not is_done:
                stop_file.unlink(missing_ok=True)
        if is_done and group.is_first and config.run.report:
            heartbeat.enters(EVALUATING)
            report_at_the_end(config.run.dir)
    return is_done

"""`mcl demo`: from raw videos to a probe score, in a few minutes on two CPU cores."""

import argparse
import os
from pathlib import Path

from launch.cli.command import Commands, add_command
from launch.cli.demo_stages import Demo
from mcl_dist.errors import UserError

NUM_RANKS = 2
EXAMPLE = """example:
  mcl demo --dir /tmp/demo --seed 1

The folder keeps the videos, the shard sets, the pre-training run, tubelets.png and summary.json (chance, untrained
and pretrained accuracy as fractions; seconds in total and of each stage).
"""


def register(commands: Commands) -> None:
    """Add `mcl demo`."""
    parser = add_command(
        commands,
        "demo",
        run,
        help="run every step from raw videos to a probe score, on synthetic videos",
        example=EXAMPLE,
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="folder to work in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the videos and the training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of pre-training (default: from launch/cli/demo.yaml)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="the encoder is so small that a GPU is hardly faster"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run all stages in an emptied folder; returns 0."""
    demo = Demo(arguments.dir.resolve(), arguments.seed, arguments.steps, _num_ranks(arguments.device))
    demo.load_pretrain_config()  # reports wrong options before the folder is emptied
    demo.empty_folder()
    with demo.stage("write the synthetic videos"):
        demo.write_videos()
    with demo.stage("build the shard sets"):
        demo.build_shard_sets()
    with demo.stage("pre-train"):
        demo.pretrain()
    with demo.stage("evaluate"):
        untrained, pretrained = demo.evaluate()
    with demo.stage("draw tubelets"):
        picture = demo.draw_tubelets()
    demo.print_summary(untrained, pretrained, picture)
    return 0


def _num_ranks(device: str) -> int:
    """Number of ranks: two on the CPU; on GPUs one rank each, at most two."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, for this process and its ranks
        return NUM_RANKS
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; remove the option")
    return min(NUM_RANKS, torch.cuda.device_count())

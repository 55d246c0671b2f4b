"""`mcl demo`: from raw videos to a probe score, in a few minutes on two CPU cores, by the same code as real videos."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.command import Commands, add_command
from mcl_dist.errors import UserError

if TYPE_CHECKING:
    from launch.run.config import PretrainConfig

CONFIG = Path(__file__).with_name("demo.yaml")  # inside the package, so that an installed wheel has it
MARKER = ".mcl-demo"  # marks a folder that the demo may empty
NUM_STAGES = 5
NUM_CLIPS = 9  # starts 5 frames apart in 72
DRAWN_CLASS = "orbit_slow"
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
    """Run all stages in an emptied folder."""
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


@dataclass
class Demo:
    """One run of the demo: its folder, its settings, and the seconds of its stages."""

    folder: Path
    seed: int
    steps: int | None
    num_ranks: int
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def shard_set(self, split: str) -> Path:
        """Folder of the shard set of `train` or `test`."""
        return self.folder / "shards" / split

    @property
    def run_folder(self) -> Path:
        """Folder of the pre-training run."""
        return self.folder / "pretrain"

    @property
    def overrides(self) -> list[str]:
        """Overrides of `launch/cli/demo.yaml`."""
        sets = [f"data.train={self.shard_set('train')}", f"evaluate.test={self.shard_set('test')}"]
        steps = [] if self.steps is None else [f"train.steps={self.steps}"]
        return [f"run.dir={self.run_folder}", f"run.seed={self.seed}", *sets, *steps]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the name of a stage and measure its time."""
        print(f"[{len(self.stage_seconds) + 1}/{NUM_STAGES}] {name}", flush=True)
        start = time.monotonic()
        yield
        self.stage_seconds[name] = round(time.monotonic() - start, 1)

    def load_pretrain_config(self) -> PretrainConfig:
        """Load the configuration of the pre-training; errors as in `load_config`."""
        from launch.run.config import PretrainConfig
        from mcl_dist.config import load_config

        return load_config(PretrainConfig, CONFIG, self.overrides)

    def empty_folder(self) -> None:
        """Create the folder, or empty an earlier demo's; raises UserError for other files or a failed write."""
        folder = self.folder
        try:
            if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
                raise UserError(f"{folder}: holds files that no demo wrote; name another folder with --dir")
            if folder.exists():
                print(f"emptying {folder}", flush=True)
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            (folder / MARKER).touch()
        except OSError as error:
            raise UserError(f"{folder}: cannot be emptied ({error.strerror}); name another with --dir") from error

    def write_videos(self) -> None:
        """Write the synthetic training and test videos."""
        from dataloading.build.local_executor import num_cores
        from dataloading.synthetic.videos import write_synthetic

        write_synthetic(self.folder / "videos", seed=self.seed, processes=num_cores())

    def build_shard_sets(self) -> None:
        """Build both shard sets with `mcl shards build`."""
        for split in ("train", "test"):
            # The videos already have their final size, so nothing is resized.
            videos = self.folder / "videos" / split
            _run_mcl("shards", "build", videos, self.shard_set(split), "--flow", "dis", "--short-side", 0)

    def pretrain(self) -> None:
        """Pre-train with `mcl pretrain`."""
        _run_mcl("pretrain", "--config", CONFIG, "--ranks", self.num_ranks, *self.overrides)

    def evaluate(self) -> tuple[float, float]:
        """Top-1 accuracy of the untrained and of the pretrained encoder."""
        from launch.evaluation.config import SvmEvaluation
        from launch.evaluation.encoder_under_test import RANDOM, load_encoder_under_test
        from launch.evaluation.frozen_protocols import evaluate_frozen
        from mcl_dist.config import load_config

        config = load_config(SvmEvaluation, None, [f"clips.count={NUM_CLIPS}", "features.keep=false"])
        start = load_encoder_under_test(RANDOM, self.load_pretrain_config())
        encoders = (start, load_encoder_under_test(str(self.run_folder)))
        train, test = str(self.shard_set("train")), str(self.shard_set("test"))
        untrained, pretrained = (
            scores.measures["top1"] for each in encoders if (scores := evaluate_frozen(each, train, test, config))
        )
        return untrained, pretrained

    def draw_tubelets(self) -> Path:
        """Draw the tubelets of a training video whose disc moves; return the picture's path."""
        from dataloading.reading.shard_set import ShardSet
        from launch.report.tubelet_picture import save_tubelet_picture

        train = ShardSet(str(self.shard_set("train")))
        position = int((train.labels == train.manifest.classes.index(DRAWN_CLASS)).argmax())
        path = self.folder / "tubelets.png"
        save_tubelet_picture(path, train, position, self.load_pretrain_config().data, seed=self.seed)
        return path

    def print_summary(self, untrained: float, pretrained: float, picture: Path) -> None:
        """Print accuracies and times, and write them to `summary.json`."""
        from dataloading.synthetic.scenes import SCENES
        from launch.report.run_report import REPORT_FILE

        classes = SCENES["demo"].classes
        accuracy = {"chance": 1 / len(classes), "untrained": untrained, "pretrained": pretrained}
        seconds = round(sum(self.stage_seconds.values()), 1)
        summary = {**accuracy, "seconds": seconds, "stages": self.stage_seconds}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"\nlinear SVM on frozen features, {len(classes)} classes of motion")
        for name, value in accuracy.items():
            print(f"  {name:<26}{value:8.1%}")
        print("seconds")
        for name, value in (*self.stage_seconds.items(), ("total", seconds)):
            print(f"  {name:<26}{value:8.1f}")
        print(f"picture: {picture}")
        print(f"report of the pre-training: {self.run_folder / REPORT_FILE}")


def _run_mcl(*arguments: object) -> None:
    """Run another `mcl` command; after a failure, which it has reported, exit with its code."""
    from launch.cli.main import parser

    parsed = parser().parse_args([str(argument) for argument in arguments])
    code = int(parsed.run(parsed))
    if code:
        raise SystemExit(code)

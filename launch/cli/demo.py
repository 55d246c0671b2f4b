"""`mcl demo`: from raw videos to a probe score through every real part, in a few minutes on two CPU cores."""

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

from mcl_dist.errors import UserError

if TYPE_CHECKING:
    from launch.run.config import PretrainConfig

CONFIG = Path(__file__).with_name("demo.yaml")  # inside the package, so that an installed wheel has it
MARKER = ".mcl-demo"  # a folder with it is ours to empty
NUM_RANKS = 2
NUM_CLIPS = 9  # starts 5 frames apart in 72
PICTURED = "orbit_slow"
EXAMPLE = """example:
  mcl demo --dir /tmp/demo --seed 1

The folder keeps the videos, the shard sets, the pre-training run, tubelets.png and summary.json (chance, untrained
and pretrained accuracy as fractions, seconds in all and of each stage).
"""


@dataclass
class Demo:
    """One run of the demonstration: where it lives, its settings, and the seconds that its stages took."""

    folder: Path
    seed: int
    steps: int | None
    num_ranks: int
    stages: dict[str, float] = field(default_factory=dict)

    def shards(self, split: str) -> Path:
        """The shard set of `train` or `test`."""
        return self.folder / "shards" / split

    @property
    def overrides(self) -> list[str]:
        """What this run changes in `launch/cli/demo.yaml`."""
        changes = [f"run.dir={self.folder / 'pretrain'}", f"run.seed={self.seed}", f"data.train={self.shards('train')}"]
        changes += [f"evaluate.test={self.shards('test')}"]
        return changes + ([] if self.steps is None else [f"train.steps={self.steps}"])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        print(f"[{len(self.stages) + 1}/5] {name}", flush=True)
        start = time.monotonic()
        yield
        self.stages[name] = round(time.monotonic() - start, 1)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl demo`."""
    parser = commands.add_parser(
        "demo",
        help="show the whole way from raw videos to a probe score, on synthetic ones",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="folder to work in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the videos and of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="length of pre-training (default: as launch/cli/demo.yaml)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="so tiny an encoder gains little from a GPU"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run all stages afresh; returns 0."""
    demo = Demo(arguments.dir.resolve(), arguments.seed, arguments.steps, _num_ranks(arguments.device))
    _pretrain_config(demo)  # a mistake in the options is told before anything is touched
    _empty(demo.folder)
    with demo.stage("write the synthetic videos"):
        _write_videos(demo)
    with demo.stage("build the shard sets"):
        _build_shards(demo)
    with demo.stage("pre-train"):
        _pretrain(demo)
    with demo.stage("evaluate"):
        untrained, pretrained = _evaluate(demo)
    with demo.stage("draw tubelets"):
        picture = _draw(demo)
    _report(demo, untrained, pretrained, picture)
    return 0


def _num_ranks(device: str) -> int:
    """Ranks to train with: two on the CPU, at most two GPUs, one rank each."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks, here and in the ranks
        return NUM_RANKS
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; leave the option out")
    return min(NUM_RANKS, torch.cuda.device_count())


def _empty(folder: Path) -> None:
    """Make the folder, or empty it of an earlier demonstration; nobody else's files are touched.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    try:
        if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds files that are not of a demonstration; name another folder with --dir")
        if folder.exists():
            print(f"starting afresh in {folder}", flush=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be emptied ({error.strerror}); name another folder with --dir") from error


def _write_videos(demo: Demo) -> None:
    from dataloading.build.local_executor import num_cores
    from dataloading.synthetic.videos import write_synthetic

    write_synthetic(demo.folder / "videos", seed=demo.seed, processes=num_cores())


def _build_shards(demo: Demo) -> None:
    for split in ("train", "test"):
        source = demo.folder / "videos" / split
        # The videos are as small as they should be: nothing is resized.
        _mcl("shards", "build", source, demo.shards(split), "--flow", "dis", "--short-side", 0)


def _pretrain_config(demo: Demo) -> PretrainConfig:
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    return load_config(PretrainConfig, CONFIG, demo.overrides)


def _pretrain(demo: Demo) -> None:
    _mcl("pretrain", "--config", CONFIG, "--ranks", demo.num_ranks, *demo.overrides)


def _mcl(*words: object) -> None:
    """Run another command as a user would type it; when it fails it has said why, and its exit code is ours."""
    from launch.cli.main import parser

    parsed = parser().parse_args([str(word) for word in words])
    code = int(parsed.run(parsed))
    if code:
        raise SystemExit(code)


def _evaluate(demo: Demo) -> tuple[float, float]:
    """Top-1 of the untrained and of the pretrained encoder."""
    from launch.evaluation.config import SvmEvaluation
    from launch.evaluation.encoder_under_test import RANDOM, load_subject
    from launch.evaluation.frozen_protocols import evaluate_frozen
    from mcl_dist.config import load_config

    config = load_config(SvmEvaluation, None, [f"clips.count={NUM_CLIPS}", "features.keep=false"])
    subjects = load_subject(RANDOM, _pretrain_config(demo)), load_subject(str(demo.folder / "pretrain"))
    train, test = (str(demo.shards(split)) for split in ("train", "test"))
    untrained, pretrained = (
        scores.measures["top1"] for each in subjects if (scores := evaluate_frozen(each, train, test, config))
    )
    return untrained, pretrained


def _draw(demo: Demo) -> Path:
    """The picture of a training video whose disc travels."""
    from dataloading.reading.shard_set import ShardSet
    from launch.report.tubelet_picture import draw_picture

    train = ShardSet(str(demo.shards("train")))
    position = int((train.labels == train.manifest.classes.index(PICTURED)).argmax())
    path = demo.folder / "tubelets.png"
    draw_picture(path, train, position, _pretrain_config(demo).data, seed=demo.seed)
    return path


def _report(demo: Demo, untrained: float, pretrained: float, picture: Path) -> None:
    """Print the table, and write it for machines."""
    from dataloading.synthetic.scenes import SCENES
    from launch.report.run_report import FILE as REPORT

    classes = SCENES["demo"].classes
    accuracy = {"chance": 1 / len(classes), "untrained": untrained, "pretrained": pretrained}
    seconds = round(sum(demo.stages.values()), 1)
    summary = {**accuracy, "seconds": seconds, "stages": demo.stages}
    (demo.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nlinear SVM on frozen features, {len(classes)} classes of motion")
    for name, value in accuracy.items():
        print(f"  {name:<26}{value:8.1%}")
    print("seconds")
    for name, value in (*demo.stages.items(), ("in all", seconds)):
        print(f"  {name:<26}{value:8.1f}")
    print(f"picture: {picture}")
    print(f"report of the pre-training: {demo.folder / 'pretrain' / REPORT}")

"""`mcl bench`: flow, build, loader, negatives, step, checkpoint, exporter and method."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launch.benchmarks import ablation as method_benchmark
from launch.cli import demo
from mcl_dist.errors import ConfigError

if TYPE_CHECKING:
    from launch.benchmarks.flow import EstimatorResult
    from launch.run.config import PretrainConfig

FLOW_EXAMPLE = """\
example:
  mcl bench flow --videos videos --json
  (videos holds a folder a class; without --videos, synthetic clips are made)"""
BUILD_EXAMPLE = """\
example:
  mcl bench build --video clip.mp4 --flow dis --json"""

LOADER_EXAMPLE = """\
example:
  mcl bench loader --data shards/train --epochs 3 data.crop=112 --json
  mcl bench loader --data s3://bucket/train --config configs/pretrain/kinetics400.yaml --workers 4 --fingerprint"""
NEGATIVES_EXAMPLE = """\
example:
  mcl bench negatives --queue 1048576 --batch 64 --json
  mcl bench negatives --world-size 2"""
CHECKPOINT_EXAMPLE = """\
example:
  mcl bench checkpoint --json
  mcl bench checkpoint --config configs/pretrain/kinetics400.yaml --folder s3://bucket/bench --rounds 3"""
EXPORTER_EXAMPLE = """\
example:
  mcl bench exporter --config configs/pretrain/tiny.yaml --json"""
STEP_EXAMPLE = """\
example:
  mcl bench step --config configs/pretrain/tiny.yaml --json
  mcl bench step --config configs/pretrain/kinetics400.yaml --forms plain,trainer train.global_batch=64"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl bench` and its commands."""
    bench = commands.add_parser("bench", help="measure what the parts cost")
    actions = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    flow = actions.add_parser(
        "flow",
        help="cost and agreement of the flow estimators",
        description="Compare the flow estimators with OpenCV's TV-L1 at full size and its own settings, which is run "
        "beside them: CPU time on one thread, correlation of the frame maps, overlap of the high-motion box.",
        epilog=FLOW_EXAMPLE,
        formatter_class=raw,
    )
    flow.add_argument("--videos", type=Path, help="folder of class folders of videos (default: synthetic clips)")
    flow.add_argument(
        "--groups", type=int, default=8, help="moments looked at in every video, spread evenly, 4 flows each (8)"
    )
    flow.add_argument("--device", default="cpu", help="what tvl1 computes on: cpu, cuda or cuda:N (cpu)")
    flow.add_argument("--short-side", type=int, default=256, help="pixels that the shorter side is resized to (256)")
    flow.add_argument("--json", action="store_true", help="print one JSON list on standard output")
    flow.set_defaults(run=run_flow)
    build = actions.add_parser(
        "build",
        help="cost of turning one video into a sample, stage by stage",
        description="Turn one video into a sample as a worker of `mcl shards build` does, and tell the CPU seconds.",
        epilog=BUILD_EXAMPLE,
        formatter_class=raw,
    )
    build.add_argument("--video", type=Path, required=True, help="the video file")
    build.add_argument("--flow", default="tvl1", help="flow estimator: tvl1, opencv-tvl1 or dis (tvl1)")
    build.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    build.set_defaults(run=run_build)
    _add_loader(actions)
    _add_negatives(actions)
    _add_step(actions)
    _add_checkpoint(actions)
    method_benchmark.register(actions)
    _add_exporter(actions)


def _add_loader(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    loader = actions.add_parser(
        "loader",
        help="what feeding the training costs, stage by stage",
        description="Make the batches of whole epochs as training does, and throw them away. Times leave the first "
        "batch out, which pays for the start; with --fingerprint they hold the hashing.",
        epilog=LOADER_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loader.add_argument("--data", required=True, help="URL of the shard set")
    loader.add_argument("--config", help="configuration of a pre-training run (default: the method's own numbers)")
    loader.add_argument("overrides", nargs="*", metavar="key=value", help="override it, e.g. train.global_batch=8")
    loader.add_argument("--epochs", type=int, default=1, help="passes over the set (1)")
    loader.add_argument("--world-size", type=int, default=1, help="ranks, played one after another (1)")
    loader.add_argument("--workers", type=int, help="worker processes of a rank (data.workers)")
    loader.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what decodes (cpu)")
    loader.add_argument("--metrics-port", type=int, help="answer Prometheus on the loopback at this port meanwhile")
    loader.add_argument("--fingerprint", action="store_true", help="tell a digest of all global batches in order")
    loader.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    loader.set_defaults(run=run_loader)


def _add_negatives(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    negatives = actions.add_parser(
        "negatives",
        help="time and memory of the inter loss over a large queue, form by form",
        description="Run forward and backward of the inter loss in each of its forms: with all logits (naive), in "
        "chunks, sharded over ranks, and by the fused kernel where it runs. Every form has processes of its own; "
        "memory is what a round takes beyond queue and queries.",
        epilog=NEGATIVES_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    negatives.add_argument("--queue", type=int, default=131072, help="K negatives (131072)")
    negatives.add_argument("--batch", type=int, default=64, help="queries of a rank (64)")
    negatives.add_argument("--dim", type=int, default=128, help="d of the vectors (128)")
    negatives.add_argument("--world-size", type=int, default=1, help="ranks (1)")
    negatives.add_argument("--json", action="store_true", help="print one JSON list on standard output")
    negatives.set_defaults(run=run_negatives)


def _add_step(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    step = actions.add_parser(
        "step",
        help="what a training step costs, from a plain form to that of mcl pretrain",
        description="Take steps on videos of noise, the whole global batch on one device: first written plainly, then "
        "with one change more at a time, at last as `mcl pretrain` takes them. Every form has a process of its own.",
        epilog=STEP_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.add_argument("--config", help="configuration of a pre-training run (default: the demo's)")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="override it, e.g. train.global_batch=8")
    step.add_argument("--steps", type=int, default=10, help="steps measured of every form, after three others (10)")
    step.add_argument(
        "--forms", type=lambda text: text.split(","), default=[], help="of plain,closed_form,...,trainer (all)"
    )
    step.add_argument("--json", action="store_true", help="print one JSON list on standard output")
    step.set_defaults(run=run_step)


def _add_checkpoint(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = actions.add_parser(
        "checkpoint",
        help="how long training stands still for a checkpoint",
        description="Save the configured networks, queue and optimizer by turns in two ways: waiting until all is "
        "written and synced, and in the background while steps on small clips go on.",
        epilog=CHECKPOINT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoint.add_argument("--config", help="configuration of a pre-training run (default: the method's own numbers)")
    checkpoint.add_argument("overrides", nargs="*", metavar="key=value", help="override it, e.g. objective.queue=65536")
    checkpoint.add_argument("--folder", help="URL to save to (default: a temporary folder)")
    checkpoint.add_argument("--rounds", type=int, default=5, help="saves in each way (5)")
    checkpoint.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    checkpoint.set_defaults(run=run_checkpoint)


def _add_exporter(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    exporter = actions.add_parser(
        "exporter",
        help="what exporting metrics costs a training step",
        description="Take steps as `mcl pretrain` does, on videos of noise, every other one exported to a Prometheus "
        "that scrapes. The overhead is counted in CPU time, which other programs disturb least; the ratio of wall "
        "times is beside it, with its spread.",
        epilog=EXPORTER_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exporter.add_argument("--config", help="configuration of a pre-training run (default: the demo's)")
    exporter.add_argument("overrides", nargs="*", metavar="key=value", help="override it, e.g. train.global_batch=8")
    exporter.add_argument("--steps", type=int, default=100, help="steps of each kind (100)")
    exporter.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    exporter.set_defaults(run=run_exporter)


def run_flow(args: argparse.Namespace) -> int:
    """Measure every estimator; a line each."""
    from launch.benchmarks.flow import benchmark

    if args.groups < 1:
        raise ConfigError(f"--groups: found {args.groups}, must be at least 1")
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        folder = args.videos or _synthetic(Path(temporary))
        results = benchmark(folder, args.groups, args.short_side, _say, _device(args.device))
    if args.json:
        print(json.dumps([vars(result) for result in results]))
    else:
        _print_table(results)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Measure one video."""
    from launch.benchmarks.build import measure_build

    report = measure_build(args.video, args.flow)
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{report['cpu_seconds']:.2f} CPU seconds for {report['frames']} frames")
    for stage, seconds in report["stages"].items():
        print(f"  {stage:<10}{seconds:>8.2f}")
    print(f"{report['peak_rss_bytes'] / 2**20:.0f} MiB at the most")
    return 0


def run_loader(args: argparse.Namespace) -> int:
    """Measure the loader."""
    import torch

    from launch.benchmarks.loader import benchmark_settings, measure_loader
    from launch.telemetry.batch_job_metrics import showing
    from monitoring.metrics.registry import Registry
    from monitoring.metrics.training_metrics import show_loader

    for name, value in (("--epochs", args.epochs), ("--world-size", args.world_size)):
        if value < 1:
            raise ConfigError(f"{name}: found {value}, must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: found cuda, but this machine has no CUDA device")
    overrides = args.overrides + ([] if args.workers is None else [f"data.workers={args.workers}"])
    board = Registry(["rank"])
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as cache, showing(board, args.metrics_port):
        report = measure_loader(
            benchmark_settings(args.data, args.config, overrides, cache),
            epochs=args.epochs,
            num_ranks=args.world_size,
            device=torch.device(args.device),
            fingerprint=args.fingerprint,
            listen=None if args.metrics_port is None else lambda report: show_loader(board, report),
        )
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        if name != "stages":
            print(f"{name:<22} {value if isinstance(value, str | int) else format(value, '.4f')}")
    print("CPU seconds per video, by stage")
    for stage, seconds in report["stages"].items():
        print(f"  {stage:<20} {seconds:.4f}")
    return 0


def run_negatives(args: argparse.Namespace) -> int:
    """Measure every form of the inter loss; a line each."""
    from launch.benchmarks.negatives import benchmark

    for name, value, least in (
        ("--queue", args.queue, args.world_size),
        ("--batch", args.batch, 1),
        ("--dim", args.dim, 1),
        ("--world-size", args.world_size, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}: found {value}, must be at least {least}")
    results = list(benchmark(args.queue, args.batch, args.dim, args.world_size))
    if args.json:
        print(json.dumps([vars(result) for result in results]))
        return 0
    print(f"{'form':<10}{'ms':>10}{'peak MiB':>12}{'loss':>12}")
    for each in results:
        print(f"{each.name:<10}{each.ms:>10.1f}{each.peak_bytes / 2**20:>12.1f}{each.loss:>12.6f}")
    return 0


def run_step(args: argparse.Namespace) -> int:
    """Measure every form of the step; a line each."""
    from launch.benchmarks.step import PHASES, benchmark

    results = benchmark(_config_of_steps(args, least=1), args.steps, _say, args.forms)
    if args.json:
        print(json.dumps([vars(result) for result in results]))
        return 0
    columns = ("videos/s", "speedup", "CPU ms", "GFLOP/s", "of matmul", "peak MiB")
    print(f"{'form':<15}" + "".join(f"{column:>11}" for column in columns) + "  ms by phase")
    for each in results:
        phases = "  ".join(f"{phase} {each.ms[phase]:.1f}" for phase in PHASES)
        print(
            f"{each.name:<15}{each.videos_per_second:>11.2f}{each.speedup:>11.2f}{each.cpu_ms:>11.1f}"
            f"{each.tflops * 1e3:>11.1f}{each.matmul_share:>11.1%}{each.peak_bytes / 2**20:>11.0f}  {phases}"
        )
    return 0


def run_exporter(args: argparse.Namespace) -> int:
    """Measure the listener, the scrapes, and both beside steps."""
    from launch.benchmarks.exporter import benchmark

    report = vars(benchmark(_config_of_steps(args, least=2), args.steps))
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        print(f"{name:<14} {value:.4f}")
    return 0


def _config_of_steps(args: argparse.Namespace, least: int) -> PretrainConfig:
    from launch.run.config import PretrainConfig, check
    from mcl_dist.config import load_config

    if args.steps < least:
        raise ConfigError(f"--steps: found {args.steps}, must be at least {least}")
    path = args.config or demo.CONFIG
    # No video is read and no folder written, whatever the configuration names.
    config = load_config(PretrainConfig, path, ["data.train=none", "run.dir=none", *args.overrides])
    check(config, num_ranks=1)
    return config


def run_checkpoint(args: argparse.Namespace) -> int:
    """Measure both ways of saving."""
    from launch.benchmarks.checkpoint import benchmark
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    if args.rounds < 1:
        raise ConfigError(f"--rounds: found {args.rounds}, must be at least 1")
    config = load_config(PretrainConfig, args.config, ["data.train=none", "run.dir=none", *args.overrides])
    report = vars(benchmark(config, args.folder, args.rounds, _say))
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        print(f"{name:<22} {value if isinstance(value, int) else format(value, '.4f')}")
    return 0


def _device(name: str) -> str:
    import torch

    found = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in found or (name == "cuda" and not torch.cuda.is_available()):
        there = f"there are {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "PyTorch sees no GPU"
        raise ConfigError(f"--device: found {name!r}; must be cpu, cuda or cuda:N, and {there}")
    return name


def _synthetic(folder: Path) -> Path:
    from dataloading.synthetic.videos import write_synthetic

    write_synthetic(folder, seed=0, train_per_class=1, test_per_class=0)
    return folder / "train"


def _print_table(results: list[EstimatorResult]) -> None:
    print(f"{'estimator':<14}{'ms/frame':>10}{'CPU ratio':>11}{'agreement':>11}{'box IoU':>9}{'frames/s':>10}")
    for each in results:
        print(
            f"{each.name:<14}{each.ms_per_frame:>10.1f}{each.cpu_ratio:>11.1f}{each.agreement:>11.3f}"
            f"{each.box_iou:>9.3f}{each.frames_per_second:>10.0f}"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""`mcl bench`: measure flow, build, loader, negatives, step, checkpoint, method and exporter."""

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from launch.benchmarks import ablation
from launch.cli.command import Commands, check_minimums
from launch.cli.demo import CONFIG as DEMO_CONFIG
from mcl_dist.errors import ConfigError

Run = Callable[[argparse.Namespace], int]


def register(commands: Commands) -> None:
    """Add `mcl bench` and its commands."""
    bench = commands.add_parser("bench", help="measure the cost of the parts")
    actions = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_flow(actions.add_parser("flow", help="cost and agreement of the flow estimators"))
    _add_build(actions.add_parser("build", help="cost of processing one video into a sample, by stage"))
    _add_loader(actions.add_parser("loader", help="cost of loading batches, by stage"))
    _add_negatives(actions.add_parser("negatives", help="time and memory of the inter loss over a large queue"))
    _add_step(actions.add_parser("step", help="cost of a training step, from a reference to that of mcl pretrain"))
    _add_checkpoint(actions.add_parser("checkpoint", help="time for which a checkpoint blocks training"))
    _add_method(actions.add_parser("method", help="gain of each part of the method, on synthetic sets"))
    _add_exporter(actions.add_parser("exporter", help="cost of exporting metrics per training step"))


def _add_flow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", type=Path, help="folder of class folders of videos (default: synthetic clips)")
    parser.add_argument("--groups", type=int, default=8, help="groups of 4 flows per video, spread evenly (8)")
    parser.add_argument("--device", default="cpu", help="where tvl1 runs: cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--short-side", type=int, default=256, help="pixels that the shorter side is resized to (256)")
    _finish(parser, _run_flow, "list", "mcl bench flow --videos videos --json")


def _run_flow(args: argparse.Namespace) -> int:
    """Compare CPU time and motion maps of the flow estimators with OpenCV's TV-L1 at full size, its own settings."""
    from launch.benchmarks.flow import measure_flow

    check_minimums(args, {"groups": 1})
    results = measure_flow(args.videos, args.groups, args.short_side, _log, args.device)
    head = f"{'estimator':<14}{'ms/frame':>10}{'CPU ratio':>11}{'agreement':>11}{'box IoU':>9}{'frames/s':>10}"
    lines = (
        f"{each.name:<14}{each.ms_per_frame:>10.1f}{each.cpu_ratio:>11.1f}{each.agreement:>11.3f}"
        f"{each.box_iou:>9.3f}{each.frames_per_second:>10.0f}"
        for each in results
    )
    return _print(args, [vars(result) for result in results], [head, *lines])


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--video", type=Path, required=True, help="the video file")
    parser.add_argument("--flow", default="tvl1", help="flow estimator: tvl1, opencv-tvl1 or dis (tvl1)")
    _finish(parser, _run_build, "object", "mcl bench build --video clip.mp4 --flow dis --json")


def _run_build(args: argparse.Namespace) -> int:
    """Process one video into a sample like a worker of `mcl shards build`, and print the CPU seconds."""
    from launch.benchmarks.build import measure_build

    report = measure_build(args.video, args.flow)
    lines = [
        f"{report['cpu_seconds']:.2f} CPU seconds for {report['frames']} frames",
        *(f"  {stage:<10}{seconds:>8.2f}" for stage, seconds in report["stages"].items()),
        f"{report['peak_rss_bytes'] / 2**20:.0f} MiB peak memory",
    ]
    return _print(args, report, lines)


def _add_loader(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="URL of the shard set")
    _add_config(parser, "the method's own values", "train.global_batch=8")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the set (1)")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, measured one after another (1)")
    parser.add_argument("--workers", type=int, help="worker processes per rank (data.workers)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where videos are decoded (cpu)")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on the loopback at this port")
    parser.add_argument("--fingerprint", action="store_true", help="add a digest of all global batches in order")
    examples = (
        "mcl bench loader --data shards/train --epochs 3 data.crop=112 --json",
        "mcl bench loader --data s3://bucket/train --config configs/pretrain/ucf101.yaml --workers 4 --fingerprint",
    )
    _finish(parser, _run_loader, "object", *examples)


def _run_loader(args: argparse.Namespace) -> int:
    """Load whole epochs as training does; times exclude the first batch, and include the hashing of --fingerprint."""
    import torch

    from launch.benchmarks.loader import loader_benchmark_config, measure_loader
    from launch.telemetry.batch_job_metrics import serve_or_push
    from monitoring.metrics.registry import Registry
    from monitoring.metrics.training_metrics import update_loader_metrics

    check_minimums(args, {"epochs": 1, "world_size": 1})
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: found cuda, but this machine has no CUDA device")
    overrides = args.overrides + ([] if args.workers is None else [f"data.workers={args.workers}"])
    registry = Registry(["rank"])
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as cache, serve_or_push(registry, args.metrics_port):
        report = measure_loader(
            loader_benchmark_config(args.data, args.config, overrides, cache),
            epochs=args.epochs,
            num_ranks=args.world_size,
            device=torch.device(args.device),
            fingerprint=args.fingerprint,
            on_report=None if args.metrics_port is None else lambda report: update_loader_metrics(registry, report),
        )
    lines = [
        *_values({name: value for name, value in report.items() if name != "stages"}),
        "CPU seconds per video, by stage",
        *(f"  {stage:<20} {seconds:.4f}" for stage, seconds in report["stages"].items()),
    ]
    return _print(args, report, lines)


def _add_negatives(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queue", type=int, default=131072, help="K negatives (131072)")
    parser.add_argument("--batch", type=int, default=64, help="queries per rank (64)")
    parser.add_argument("--dim", type=int, default=128, help="d of the vectors (128)")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (1)")
    example = "mcl bench negatives --queue 1048576 --batch 64 --json"
    _finish(parser, _run_negatives, "list", example, "mcl bench negatives --world-size 2")


def _run_negatives(args: argparse.Namespace) -> int:
    """Run forward and backward of the inter loss in each variant, in processes of its own.

    The variants: all logits (naive), chunks, chunks sharded over ranks, and the fused kernel if the device has one.
    Memory is measured in addition to queue and queries.
    """
    from launch.benchmarks.negatives import measure_negatives

    check_minimums(args, {"queue": args.world_size, "batch": 1, "dim": 1, "world_size": 1})
    results = list(measure_negatives(args.queue, args.batch, args.dim, args.world_size))
    lines = [f"{'form':<10}{'ms':>10}{'peak MiB':>12}{'loss':>12}"]
    lines += [f"{each.name:<10}{each.ms:>10.1f}{each.peak_bytes / 2**20:>12.1f}{each.loss:>12.6f}" for each in results]
    return _print(args, [vars(result) for result in results], lines)


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "the demo's", "train.global_batch=8")
    parser.add_argument("--steps", type=int, default=10, help="measured steps per variant, after three others (10)")
    forms_help = "variants, of plain,closed_form,...,trainer (all)"
    parser.add_argument("--forms", type=lambda text: text.split(","), default=[], help=forms_help)
    examples = (
        "mcl bench step --config configs/pretrain/tiny.yaml --json",
        "mcl bench step --config configs/pretrain/kinetics400.yaml --forms plain,trainer train.global_batch=64",
    )
    _finish(parser, _run_step, "list", *examples)


def _run_step(args: argparse.Namespace) -> int:
    """Take steps on noise, with the whole global batch on one device, in one process per variant.

    The first variant is a reference implementation; each other adds one optimisation; the last is `mcl pretrain`.
    """
    from launch.benchmarks.step import PHASES, measure_step
    from launch.benchmarks.step_variants import noise_config

    check_minimums(args, {"steps": 1})
    config = noise_config(args.config or DEMO_CONFIG, args.overrides)
    results = measure_step(config, args.steps, _log, args.forms)
    columns = ("videos/s", "speedup", "CPU ms", "GFLOP/s", "of matmul", "peak MiB")
    lines = [f"{'form':<15}" + "".join(f"{column:>11}" for column in columns) + "  ms by phase"]
    for each in results:
        phases = "  ".join(f"{phase} {each.ms[phase]:.1f}" for phase in PHASES)
        lines.append(
            f"{each.name:<15}{each.videos_per_second:>11.2f}{each.speedup:>11.2f}{each.cpu_ms:>11.1f}"
            f"{each.tflops * 1e3:>11.1f}{each.matmul_share:>11.1%}{each.peak_bytes / 2**20:>11.0f}  {phases}"
        )
    return _print(args, [vars(result) for result in results], lines)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "the method's own values", "objective.queue=65536")
    parser.add_argument("--folder", help="URL to save to (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="saves in each way (5)")
    examples = (
        "mcl bench checkpoint --json",
        "mcl bench checkpoint --config configs/pretrain/kinetics400.yaml --folder s3://bucket/bench --rounds 3",
    )
    _finish(parser, _run_checkpoint, "object", *examples)


def _run_checkpoint(args: argparse.Namespace) -> int:
    """Save networks, queue and optimizer alternately: blocking until all is synced, and in the background of steps."""
    from launch.benchmarks.checkpoint import measure_checkpoint
    from launch.run.config import PretrainConfig
    from mcl_dist.config import load_config

    check_minimums(args, {"rounds": 1})
    config = load_config(PretrainConfig, args.config, ["data.train=none", "run.dir=none", *args.overrides])
    report = vars(measure_checkpoint(config, args.folder, args.rounds, _log))
    return _print(args, report, _values(report))


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scene", choices=tuple(ablation.SCENES), default="distracting", help="content of the videos")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the sets, the runs and results.html")
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant (3)")
    every = tuple(ablation.VARIANTS)
    parser.add_argument("--variants", type=_variants, default=every, help=f"of {','.join(every)} (all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device for training (cpu)")
    for split, count in ablation.PER_CLASS.items():
        parser.add_argument(f"--{split}-per-class", type=int, default=count, help=f"{split} videos per class ({count})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change all runs, e.g. train.steps=600")
    examples = (
        "mcl bench method --scene distracting --dir runs/distracting --seeds 3 --jobs 2",
        "mcl bench method --scene alike --dir runs/alike --variants contrastive,full train.steps=600",
    )
    _finish(parser, _run_method, "list", *examples)


def _run_method(args: argparse.Namespace) -> int:
    """Pre-train with and without each of the method's two uses of motion; compare the encoders by SVM and kNN.

    The same command resumes; other settings need another folder.
    """
    check_minimums(args, {"seeds": 1, "jobs": 1, **{f"{split}_per_class": 1 for split in ablation.PER_CLASS}})
    study = ablation.Study(
        folder=args.dir.resolve(),
        scene=args.scene,
        seeds=args.seeds,
        variants=args.variants,
        jobs=args.jobs,
        device=args.device,
        per_class={split: getattr(args, f"{split}_per_class") for split in ablation.PER_CLASS},
        overrides=tuple(args.overrides),
    )
    scores = ablation.measure_method(study, _log)
    _print(args, [vars(each) for each in scores], [ablation.table(scores)])
    _log(f"curves of the runs: {ablation.write_page(study, scores)}")
    return 0


def _add_exporter(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, "the demo's", "train.global_batch=8")
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind (100)")
    _finish(parser, _run_exporter, "object", "mcl bench exporter --config configs/pretrain/tiny.yaml --json")


def _run_exporter(args: argparse.Namespace) -> int:
    """Take steps like `mcl pretrain` on noise, every other one exported; compare CPU time, and wall time as a check."""
    from launch.benchmarks.exporter import measure_exporter
    from launch.benchmarks.step_variants import noise_config

    check_minimums(args, {"steps": 2})
    report = vars(measure_exporter(noise_config(args.config or DEMO_CONFIG, args.overrides), args.steps))
    return _print(args, report, (f"{name:<14} {value:.4f}" for name, value in report.items()))


def _add_config(parser: argparse.ArgumentParser, default: str, example: str) -> None:
    parser.add_argument("--config", help=f"configuration of a pre-training run (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"override it, e.g. {example}")


def _finish(parser: argparse.ArgumentParser, run: Run, result: Literal["list", "object"], *examples: str) -> None:
    """Add `--json`, the function to run with its docstring as the description, and examples."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON {result} on standard output")
    parser.description = inspect.getdoc(run)
    parser.epilog = "\n  ".join(["example:", *examples])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)


def _variants(text: str) -> tuple[str, ...]:
    for name in (names := tuple(text.split(","))):
        if name not in ablation.VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ablation.VARIANTS)}")
    return names


def _values(report: Mapping[str, Any]) -> Iterator[str]:
    for name, value in report.items():
        yield f"{name:<22} {value if isinstance(value, str | int) else format(value, '.4f')}"


def _print(args: argparse.Namespace, report: object, lines: Iterable[str]) -> int:
    """Print the report as JSON or as lines; returns the exit code."""
    print(json.dumps(report) if args.json else "\n".join(lines))
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""`mcl bench flow` and `mcl bench build`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mcl_dist.errors import ConfigError

if TYPE_CHECKING:
    from launch.flow_benchmark import EstimatorResult

FLOW_EXAMPLE = """\
example:
  mcl bench flow --videos videos --json
  (videos holds a folder a class; without --videos, synthetic clips are made)"""
BUILD_EXAMPLE = """\
example:
  mcl bench build --video clip.mp4 --flow dis --json"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl bench flow` and `mcl bench build`."""
    bench = commands.add_parser("bench", help="measure what building shards costs")
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


def run_flow(args: argparse.Namespace) -> int:
    """Measure every estimator; a line each."""
    from launch.flow_benchmark import benchmark

    if args.groups < 1:
        raise ConfigError(f"--groups: found {args.groups}, must be at least 1")
    with tempfile.TemporaryDirectory(prefix="mcl-bench-") as temporary:
        folder = args.videos or _synthetic(Path(temporary))
        results = benchmark(folder, args.groups, args.short_side, _say)
    if args.json:
        print(json.dumps([vars(result) for result in results]))
    else:
        _print_table(results)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Measure one video."""
    from launch.build_benchmark import measure_build

    report = measure_build(args.video, args.flow)
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{report['cpu_seconds']:.2f} CPU seconds for {report['frames']} frames")
    for stage, seconds in report["stages"].items():
        print(f"  {stage:<10}{seconds:>8.2f}")
    print(f"{report['peak_rss_bytes'] / 2**20:.0f} MiB at the most")
    return 0


def _synthetic(folder: Path) -> Path:
    from dataloading.synthetic import write_synthetic

    write_synthetic(folder, seed=0, train_per_class=1, test_per_class=0)
    return folder / "train"


def _print_table(results: list[EstimatorResult]) -> None:
    print(f"{'estimator':<14}{'ms/frame':>10}{'CPU ratio':>11}{'agreement':>11}{'box IoU':>9}")
    for each in results:
        print(
            f"{each.name:<14}{each.ms_per_frame:>10.1f}{each.cpu_ratio:>11.1f}{each.agreement:>11.3f}"
            f"{each.box_iou:>9.3f}"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""`mcl shards build`."""

from __future__ import annotations

import argparse
import json
import math
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloading.build.config import BuildConfig
from dataloading.build.local_executor import num_cores
from launch.cli.command import Commands, add_command, check_minimums
from launch.cli.config_flags import add_config_flags, config_from_flags, flag
from mcl_dist.errors import ConfigError

if TYPE_CHECKING:
    from dataloading.build.builder import ResumedBuild
    from dataloading.build.local_executor import Executor
    from dataloading.build.video_processor import VideoResult
    from dataloading.shards.format import Manifest
    from dataloading.videos.sources import SourceFolder
    from dataloading.videos.video_lists import ListSpec
    from mcl_dist.storage.retry import RetryPolicy
    from monitoring.http.pushgateway import Pushgateway

Log = Callable[[str], None]
EXAMPLE = """\
example:
  mcl shards build videos/train s3://bucket/train --workers 16
  (videos/train holds one folder of videos for each class)
  mcl shards build videos s3://bucket/train --list train.csv --split train"""
GPUS_PER_TASK = 0.25  # decoding and encoding a video take a processor longer than its flow takes a GPU


def register(actions: Commands) -> None:
    """Add `build` to the commands of `mcl shards`."""
    parser = add_command(
        actions,
        "build",
        run,
        help="turn a folder of class folders of videos into a shard set",
        description="Decode videos, estimate their flow and motion, and write a shard set.",
        example=EXAMPLE,
    )
    parser.add_argument("source", metavar="SRC", help="folder of the class folders or listed videos, at any fsspec URL")
    parser.add_argument("destination", metavar="DEST", help="folder to write, at any fsspec URL")
    parser.add_argument("--drop-duplicates", action="store_true", help="store one of several videos with equal bytes")
    parser.add_argument("--json", action="store_true", help="print the closing table as one JSON object")
    _add_list_arguments(parser.add_argument_group("lists", "Videos named by a list instead of class folders."))
    config = parser.add_argument_group("shard set", "The manifest records these settings.")
    add_config_flags(config, BuildConfig, exclude=("flow_quality",))
    _add_executor_arguments(parser.add_argument_group("executor", "The set has the same bytes wherever it is built."))
    _add_retry_arguments(parser.add_argument_group("retries", "Of requests to the stores of the videos and the set."))
    _add_monitoring_arguments(
        parser.add_argument_group("monitoring", "For Prometheus; a short build may end between two scrapes.")
    )


def _add_list_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--list",
        metavar="URL",
        help="Kinetics' CSV, UCF101's trainlist01.txt, the folder of UCF101's or HMDB51's split files, or a text file "
        "with one path per line, each with an optional label",
    )
    group.add_argument("--list-format", default="", help="kinetics, ucf101, hmdb51 or plain (default: detected)")
    group.add_argument("--split", default="", help="train, test or validate (default: all listed videos)")
    group.add_argument("--fold", type=int, help="number of the split in a folder of split files (default: 1)")
    group.add_argument(
        "--classes",
        metavar="URL",
        default="",
        help="file of class names, one per line in order of labels (default: the classes of the list)",
    )


def _add_executor_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--executor", default="local", help="local: processes of this machine (default), or ray")
    group.add_argument("--workers", type=int, default=num_cores(), help="local: processes (default: one per core)")
    group.add_argument(
        "--address",
        default="",
        help="ray: HOST:PORT of the head node (default: RAY_ADDRESS, or the cluster of this machine)",
    )


def _add_retry_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--retry-seconds", type=float, default=300.0, help="time to retry a failing request (300)")
    group.add_argument(
        "--request-seconds", type=float, default=30.0, help="timeout of one request, plus a second for each MiB (30)"
    )


def _add_monitoring_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--metrics-port", type=int, help="serve metrics on the loopback at this port")
    group.add_argument("--push-gateway", metavar="URL", help="push metrics to this Pushgateway, also at the end")
    group.add_argument("--push-credentials", metavar="FILE", type=Path, help="file with user:password for the gateway")
    group.add_argument("--push-ca", metavar="FILE", type=Path, help="PEM file of the CA of the gateway's certificate")


def run(args: argparse.Namespace) -> int:
    """Build a shard set; raises as `build_shards`, and for a complete set of other videos or settings."""
    from dataloading.build.builder import build_shards, find_complete_set, remove_leftovers
    from launch.telemetry.build import serve_build_metrics
    from launch.terminal.build_progress import BuildProgress
    from mcl_dist.storage.folder import Folder

    config = config_from_flags(BuildConfig, args)
    progress = BuildProgress()
    pushgateway = _pushgateway(args, progress.log)
    executor = _executor(args, progress.log)
    retry = _retry_policy(args, progress.log)
    sources, num_duplicates = _find_sources(args, progress.log)
    destination = Folder(args.destination, retry)
    manifest = find_complete_set(destination, sources, config)
    if manifest is not None:
        progress.log(f"{args.destination}: already complete, with the same videos and settings; nothing to do")
        remove_leftovers(destination)
        _print_summary(manifest, 0.0, 0, {"duplicates": num_duplicates, "retries": {}}, as_json=args.json)
        return 0
    start = time.monotonic()
    progress.total = len(sources.videos)
    with closing(progress), serve_build_metrics(args.metrics_port, progress.total, retry, pushgateway) as metrics:

        def listen(result: VideoResult | ResumedBuild) -> None:
            progress(result)
            metrics(result)

        manifest = build_shards(sources, destination, config, executor, listen)
        metrics.complete()
    counts = {"duplicates": num_duplicates, "retries": dict(retry.failures)}
    _print_summary(manifest, time.monotonic() - start, progress.num_built, counts, as_json=args.json)
    return 0


def _find_sources(args: argparse.Namespace, log: Log) -> tuple[SourceFolder, int]:
    """The videos to build, and the number of duplicates among them."""
    from dataloading.build.duplicates import find_duplicates, refuse_duplicates
    from dataloading.videos.sources import find_videos

    sources = find_videos(args.source, _list_spec(args))
    duplicates = find_duplicates(sources)
    if sources.num_ignored:
        log(f"{args.source}: {sources.num_ignored} files skipped, their extension is not that of a video")
    if args.drop_duplicates:
        return refuse_duplicates(sources, duplicates), len(duplicates)
    for path, first in duplicates.items():
        log(f"{path}: the same bytes as {first}; --drop-duplicates stores only the first")
    return sources, len(duplicates)


def _list_spec(args: argparse.Namespace) -> ListSpec | None:
    from dataloading.videos.video_lists import FORMATS, SPLITS, ListSpec

    for name, known in (("list_format", FORMATS), ("split", SPLITS)):
        if (value := getattr(args, name)) and value not in known:
            raise ConfigError(f"{flag(name)}: found {value!r}, must be one of {', '.join(known)}")
    if not args.list:
        for name in ("list_format", "split", "fold", "classes"):
            if value := getattr(args, name):
                raise ConfigError(f"{flag(name)}: found {value!r} without --list; give both")
        return None
    return ListSpec(args.list, args.list_format, args.split, args.fold or 1, args.classes)


def _executor(args: argparse.Namespace, log: Log) -> Executor:
    import torch

    from dataloading.build.local_executor import LocalExecutor
    from dataloading.build.ray_executor import RayExecutor

    if args.executor not in ("local", "ray"):
        raise ConfigError(f"--executor: found {args.executor!r}, must be local or ray")
    if args.executor == "ray":
        return RayExecutor(args.address, GPUS_PER_TASK if args.device == "cuda" else 0.0, warn=log)
    if args.address:
        raise ConfigError(f"--address: found {args.address!r} without --executor ray; give both")
    check_minimums(args, {"workers": 1})
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: found cuda, but PyTorch sees no GPU on this machine; give cpu")
    return LocalExecutor(args.workers)


def _pushgateway(args: argparse.Namespace, log: Log) -> Pushgateway | None:
    """The Pushgateway; its `run` label is the name of the destination, so another build of the set replaces it."""
    from monitoring.http.client import HttpClient
    from monitoring.http.pushgateway import Pushgateway

    if args.push_gateway is None:
        for name in ("push_credentials", "push_ca"):
            if (value := getattr(args, name)) is not None:
                raise ConfigError(f"{flag(name)}: found {str(value)!r} without --push-gateway; give both")
        return None
    client = HttpClient(args.push_gateway, args.push_credentials, args.push_ca, option="--push-")
    labels = {"run": args.destination.rstrip("/").rpartition("/")[2], "instance": socket.gethostname()}
    return Pushgateway(client, "mcl-build", labels, log)


def _retry_policy(args: argparse.Namespace, log: Log) -> RetryPolicy:
    from mcl_dist.storage.retry import RetryPolicy

    for name in ("retry_seconds", "request_seconds"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ConfigError(f"{flag(name)}: found {getattr(args, name)}, must be at least 0")
    return RetryPolicy(args.retry_seconds, args.request_seconds, log)


def _print_summary(
    manifest: Manifest, seconds: float, num_built: int, counts: dict[str, Any], *, as_json: bool
) -> None:
    from dataloading.build.builder import summarise_set

    for video in manifest.near_duplicates:
        print(f"{video.source}: looks like {video.like} ({video.bits} bits of their hashes differ)", file=sys.stderr)
    report = {**summarise_set(manifest, seconds, num_built), **counts}
    if as_json:
        print(json.dumps(report))
        return
    for name in ("refused", "retries"):
        report |= {f"{name}, {reason}": count for reason, count in report.pop(name).items()}
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<30}{value:>16,}")

"""`mcl shards build` and `mcl shards verify`."""

from __future__ import annotations

import argparse
import json
import math
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloading.build.local_executor import num_cores
from launch.cli import inspect_shards
from mcl_dist.errors import EXIT_FAILURE, ConfigError, UserError

if TYPE_CHECKING:
    from dataloading.build.builder import ResumedBuild
    from dataloading.build.local_executor import Executor
    from dataloading.build.video_processor import BuildConfig, VideoOutcome
    from dataloading.shards.format import Manifest
    from dataloading.videos.video_lists import ListChoice
    from mcl_dist.storage.retry import RetryPolicy
    from monitoring.http.pushgateway import Pushgateway

BUILD_EXAMPLE = """\
example:
  mcl shards build videos/train s3://bucket/train --workers 16
  (videos/train holds a folder a class, each with its videos)
  mcl shards build videos s3://bucket/train --list train.csv --split train"""
VERIFY_EXAMPLE = """\
example:
  mcl shards verify s3://bucket/train --json"""
GPUS_OF_A_TASK = 0.25  # a video's decoding and encoding take a processor longer than its flow takes a GPU
PLAIN_LINE_SECONDS = 30.0  # between lines of progress when nobody watches


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `mcl shards` and its commands."""
    shards = commands.add_parser("shards", help="build, check and look into shard sets")
    actions = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    build = actions.add_parser(
        "build",
        help="turn a folder of class folders of videos into a shard set",
        description="Decode videos, estimate their flow, find where they move, and write a shard set.",
        epilog=BUILD_EXAMPLE,
        formatter_class=raw,
    )
    _add_build_arguments(build)
    verify = actions.add_parser(
        "verify",
        help="check every byte of a shard set",
        description="Check manifest, digests, index and stills of a shard set; one line a problem.",
        epilog=VERIFY_EXAMPLE,
        formatter_class=raw,
    )
    verify.add_argument("url", metavar="URL", help="folder of the shard set, at any fsspec URL")
    verify.add_argument(
        "--workers", type=int, default=num_cores(), help="processes, each with a shard in memory (default: one a core)"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    verify.set_defaults(run=run_verify)
    inspect_shards.register(actions)


def _add_build_arguments(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "source", metavar="SRC", help="folder of class folders of videos, or what --list names, at any fsspec URL"
    )
    build.add_argument("destination", metavar="DEST", help="folder to write, at any fsspec URL")
    _add_list_arguments(build)
    build.add_argument(
        "--flow", default="tvl1", help="flow estimator: tvl1, opencv-tvl1, or dis (coarser); compare by mcl bench flow"
    )
    build.add_argument("--flow-size", type=float, help="share of the frame's size that flow has (1; opencv-tvl1: 0.5)")
    _add_executor_arguments(build)
    _add_patience_arguments(build)
    build.add_argument("--shard-megabytes", type=int, default=256, help="a shard is closed once it holds as much (256)")
    build.add_argument("--seed", type=int, default=0, help="of the order of the videos (0)")
    build.add_argument(
        "--short-side", type=int, default=256, help="pixels of the shorter side, 0 keeps each video's size (256)"
    )
    build.add_argument("--window", type=int, default=32, help="frames a clip covers; shorter videos are refused (32)")
    build.add_argument("--map-window", type=int, default=4, help="flows in the stack of a frame map (4; UCF101: 8)")
    build.add_argument(
        "--drop-duplicates", action="store_true", help="of videos with the same bytes store the first alone"
    )
    build.add_argument("--keep-every", type=int, default=1, help="of so many frames one is stored (1: all)")
    build.add_argument("--quality", type=int, default=90, help="JPEG quality of the frames (90)")
    _add_monitoring_arguments(build)
    build.add_argument("--json", action="store_true", help="print the closing table as one JSON object")
    build.set_defaults(run=run_build)


def _add_monitoring_arguments(build: argparse.ArgumentParser) -> None:
    seen = build.add_argument_group("monitoring", "For Prometheus, which a short build may escape between two scrapes.")
    seen.add_argument("--metrics-port", type=int, help="answer on the loopback at this port meanwhile")
    seen.add_argument("--push-gateway", metavar="URL", help="push to this Pushgateway now and then, and at the end")
    seen.add_argument("--push-credentials", metavar="FILE", type=Path, help="file with user:password for the gateway")
    seen.add_argument("--push-ca", metavar="FILE", type=Path, help="PEM file of who signed the gateway's certificate")


def _add_executor_arguments(build: argparse.ArgumentParser) -> None:
    where = build.add_argument_group("where", "The set is the same to the byte wherever it is built.")
    where.add_argument("--executor", default="local", help="local: processes of this machine (default), or ray")
    where.add_argument("--workers", type=int, default=num_cores(), help="local: processes (default: one a core)")
    where.add_argument(
        "--address",
        default="",
        help="ray: HOST:PORT of the cluster's head (default: RAY_ADDRESS, or the cluster of this machine)",
    )
    where.add_argument(
        "--device",
        default="cpu",
        help="for tvl1: cpu (default), or cuda, whose flow differs in its last bits and which the set names; "
        "a task on a Ray cluster takes a quarter of a GPU",
    )


def _add_patience_arguments(build: argparse.ArgumentParser) -> None:
    patience = build.add_argument_group("patience", "With the stores of the videos and of the set.")
    patience.add_argument(
        "--retry-seconds", type=float, default=300.0, help="how long what failed in passing is tried again (300)"
    )
    patience.add_argument(
        "--request-seconds", type=float, default=30.0, help="for one answer, and a second more for each MiB (30)"
    )


def run_build(args: argparse.Namespace) -> int:
    """Build a shard set; errors as in `build_shards`, and for a complete set of another make."""
    from dataloading.build.builder import build_shards, existing_set, remove_traces
    from dataloading.build.duplicates import find_duplicates, without
    from dataloading.videos.sources import scan_sources
    from launch.telemetry.build import build_metrics
    from mcl_dist.storage.folder import Folder

    config = _build_config(args)
    progress = BuildProgress()
    gateway = _gateway(args, progress.say)
    executor = _executor(args, progress.say)
    sources = scan_sources(args.source, _list_choice(args))
    duplicates = find_duplicates(sources)
    if args.drop_duplicates:
        sources = without(sources, duplicates)
    patience = _patience(args, progress.say)
    destination = Folder(args.destination, patience)
    if sources.num_others:
        _say(f"{args.source}: {sources.num_others} files are not videos by their extension, left out")
    if not args.drop_duplicates:
        for path, first in duplicates.items():
            _say(f"{path}: the same bytes as {first}; --drop-duplicates would leave it out")
    manifest = existing_set(destination, sources, config)
    if manifest is not None:
        _say(f"{args.destination}: complete already, built from the same videos in the same way; nothing to do")
        remove_traces(destination)
        _report(manifest, 0.0, 0, {"duplicates": len(duplicates), "retries": {}}, as_json=args.json)
        return 0
    start = time.monotonic()
    progress.total = len(sources.videos)
    try:
        with build_metrics(args.metrics_port, len(sources.videos), patience, gateway) as metrics:

            def listen(outcome: VideoOutcome | ResumedBuild) -> None:
                progress(outcome)
                metrics(outcome)

            manifest = build_shards(sources, destination, config, executor, listen)
            metrics.complete()
    finally:
        progress.close()
    more = {"duplicates": len(duplicates), "retries": dict(patience.failures)}
    _report(manifest, time.monotonic() - start, progress.num_built, more, as_json=args.json)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify a shard set: exit code 1 when there is any problem."""
    from dataloading.build.verify import Verification, verify_shards
    from mcl_dist.storage.folder import Folder

    if args.workers < 1:
        raise ConfigError(f"--workers: found {args.workers}, must be at least 1")
    try:
        result = verify_shards(Folder(args.url), args.workers)
    except UserError as error:
        if args.json:
            print(json.dumps(vars(Verification(0, 0, 0, (str(error),)))))
        raise
    for problem in result.problems:
        _say(problem)
    if args.json:
        print(json.dumps(vars(result)))
    else:
        verdict = f"{len(result.problems)} problems" if result.problems else "no problem found"
        print(f"{args.url}: {result.videos} videos in {result.shards} shards, {result.bytes} bytes: {verdict}")
    return EXIT_FAILURE if result.problems else 0


class BuildProgress:
    """Tells standard error how a build gets on: each refusal, and one line rewritten or a line now and then.

    Attributes:
        total: videos in all.
        num_built: those stored or refused by this run.
    """

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.num_built = 0
        self._refused = self._kept = self._bytes = 0
        self._start = self._told = time.monotonic()
        self._rewrites = sys.stderr.isatty()

    def __call__(self, outcome: VideoOutcome | ResumedBuild) -> None:
        """Take the next video's outcome, or first of all what an earlier run left."""
        from dataloading.build.builder import ResumedBuild
        from dataloading.shards.format import RefusedVideo

        if isinstance(outcome, ResumedBuild):
            self._go_on(outcome)
            return
        self.num_built += 1
        if not isinstance(outcome, RefusedVideo):
            self._bytes += outcome.num_bytes
        else:
            self._refused += 1
            self.say(f"{outcome.source}: refused, {outcome.reason}")
        now = time.monotonic()
        if self._rewrites or now - self._told >= PLAIN_LINE_SECONDS:
            self._told = now
            self._tell(now - self._start)

    def say(self, line: str) -> None:
        """Tell something else between two lines of progress."""
        self._clear()
        _say(line)

    def close(self) -> None:
        """Leave the line of progress clean for what follows."""
        self._clear()

    def _go_on(self, found: ResumedBuild) -> None:
        if found.taken_from:
            _say(f"the build before ({found.taken_from}) is gone without a word; taking over")
        if found.shards:
            _say(f"going on after {found.shards} finished shards with {found.videos} videos, {found.refused} refused")
        self._kept = found.videos + found.refused
        self._refused += found.refused

    def _tell(self, seconds: float) -> None:
        done = self._kept + self.num_built
        speed = self.num_built / max(seconds, 1e-9)
        line = (
            f"{done} of {self.total} videos, {self._refused} refused, {speed:.2f} videos/s, "
            f"{self._bytes / max(seconds, 1e-9) / 1e6:.1f} MB/s, about {_duration((self.total - done) / speed)} left"
        )
        self._clear()
        print(line, end="" if self._rewrites else "\n", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._rewrites:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _add_list_arguments(build: argparse.ArgumentParser) -> None:
    lists = build.add_argument_group("lists", "Videos named by a list, in place of a folder a class.")
    lists.add_argument(
        "--list",
        metavar="URL",
        help="Kinetics' CSV, UCF101's trainlist01.txt, the folder of UCF101's or HMDB51's split files, or a text file "
        "with a path a line and perhaps a label",
    )
    lists.add_argument(
        "--list-format", default="", help="kinetics, ucf101, hmdb51 or plain (default: seen from the list)"
    )
    lists.add_argument("--split", default="", help="train, test or validate (default: all that is listed)")
    lists.add_argument("--fold", type=int, help="which split of a folder of split files (1)")
    lists.add_argument(
        "--classes", metavar="URL", default="", help="class names, a line each, numbered in this order (the list's own)"
    )


def _list_choice(args: argparse.Namespace) -> ListChoice | None:
    from dataloading.videos.video_lists import FORMATS, SPLITS, ListChoice

    for option, value, known in (("list-format", args.list_format, FORMATS), ("split", args.split, SPLITS)):
        if value and value not in known:
            raise ConfigError(f"--{option}: found {value!r}, must be one of {', '.join(known)}")
    if not args.list:
        for option in ("list_format", "split", "fold", "classes"):
            if value := getattr(args, option):
                raise ConfigError(f"--{option.replace('_', '-')}: found {value!r} without --list; name the list too")
        return None
    return ListChoice(args.list, args.list_format, args.split, args.fold or 1, args.classes)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _build_config(args: argparse.Namespace) -> BuildConfig:
    from dataloading.build.video_processor import BuildConfig
    from mcl_dist.config import build_config

    names = {field.name for field in fields(BuildConfig)}
    try:
        return build_config(BuildConfig, {name: value for name, value in vars(args).items() if name in names})
    except ConfigError as error:
        name, colon, what = str(error).partition(":")
        raise ConfigError(f"--{name.replace('_', '-')}{colon}{what}") from error


def _executor(args: argparse.Namespace, tell: Callable[[str], None]) -> Executor:
    import torch

    from dataloading.build.local_executor import LocalExecutor
    from dataloading.build.ray_executor import RayExecutor

    if args.executor not in ("local", "ray"):
        raise ConfigError(f"--executor: found {args.executor!r}, must be local or ray")
    if args.executor == "ray":
        return RayExecutor(args.address, GPUS_OF_A_TASK if args.device == "cuda" else 0.0, tell=tell)
    if args.address:
        raise ConfigError(f"--address: found {args.address!r} without --executor ray; give both")
    if args.workers < 1:
        raise ConfigError(f"--workers: found {args.workers}, must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: found cuda, but PyTorch sees no GPU on this machine; give cpu")
    return LocalExecutor(args.workers)


def _gateway(args: argparse.Namespace, tell: Callable[[str], None]) -> Pushgateway | None:
    """The group of a set's metrics has the name of its folder; a build of it again replaces them."""
    from monitoring.http.client import HttpClient
    from monitoring.http.pushgateway import Pushgateway

    if args.push_gateway is None:
        for option, value in (("--push-credentials", args.push_credentials), ("--push-ca", args.push_ca)):
            if value is not None:
                raise ConfigError(f"{option}: found {str(value)!r} without --push-gateway; give both")
        return None
    client = HttpClient(args.push_gateway, args.push_credentials, args.push_ca, option="--push-")
    labels = {"run": args.destination.rstrip("/").rpartition("/")[2], "instance": socket.gethostname()}
    return Pushgateway(client, "mcl-build", labels, tell)


def _patience(args: argparse.Namespace, tell: Callable[[str], None]) -> RetryPolicy:
    from mcl_dist.storage.retry import RetryPolicy

    for option in ("retry_seconds", "request_seconds"):
        if not 0 <= getattr(args, option) < math.inf:
            raise ConfigError(f"--{option.replace('_', '-')}: found {getattr(args, option)}, must be at least 0")
    return RetryPolicy(args.retry_seconds, args.request_seconds, tell)


def _report(manifest: Manifest, seconds: float, num_built: int, more: dict[str, Any], *, as_json: bool) -> None:
    from dataloading.build.builder import summary

    for video in manifest.near_duplicates:
        _say(f"{video.source}: looks like {video.like}, {video.bits} bits of their hashes differ")
    report = {**summary(manifest, seconds, num_built), **more}
    if as_json:
        print(json.dumps(report))
        return
    for what in ("refused", "retries"):
        report |= {f"{what}, {reason}": count for reason, count in report.pop(what).items()}
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<30}{value:>16,}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

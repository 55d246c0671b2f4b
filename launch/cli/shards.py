"""`mcl shards`: its commands; `build` has a module of its own."""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from dataloading.build.local_executor import num_cores
from launch.cli import build_shards
from launch.cli.command import Commands, add_command, check_minimums
from mcl_dist.errors import EXIT_FAILURE, UserError

VERIFY_EXAMPLE = """\
example:
  mcl shards verify s3://bucket/train --json"""
INSPECT_EXAMPLE = """\
example:
  mcl shards inspect shards/train --out page.html --videos 10 --seed 3"""


def register(commands: Commands) -> None:
    """Add `mcl shards` and its commands."""
    shards = commands.add_parser("shards", help="build, check and look into shard sets")
    actions = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build_shards.register(actions)
    _add_verify(actions)
    _add_inspect(actions)


def _add_verify(actions: Commands) -> None:
    parser = add_command(
        actions,
        "verify",
        _run_verify,
        help="check every byte of a shard set",
        description="Check the manifest, digests, index and stills of a shard set; prints one line per problem.",
        example=VERIFY_EXAMPLE,
    )
    parser.add_argument("url", metavar="URL", help="folder of the shard set, at any fsspec URL")
    workers_help = "processes, each holding one shard in memory (default: one per core)"
    parser.add_argument("--workers", type=int, default=num_cores(), help=workers_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def _run_verify(args: argparse.Namespace) -> int:
    """Verify a shard set; the exit code is 1 if there is any problem."""
    from dataloading.build.verify import Verification, verify_shards
    from mcl_dist.storage.folder import Folder

    check_minimums(args, {"workers": 1})
    try:
        result = verify_shards(Folder(args.url), args.workers)
    except UserError as error:
        if args.json:
            print(json.dumps(vars(Verification(0, 0, 0, (str(error),)))))
        raise
    for problem in result.problems:
        print(problem, file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(vars(result)))
    else:
        verdict = f"{len(result.problems)} problems" if result.problems else "no problem found"
        print(f"{args.url}: {result.videos} videos in {result.shards} shards, {result.bytes} bytes: {verdict}")
    return EXIT_FAILURE if result.problems else 0


def _add_inspect(actions: Commands) -> None:
    parser = add_command(
        actions,
        "inspect",
        _run_inspect,
        help="write an HTML page about a shard set",
        description="Write one self-contained HTML file: totals of the set, and frames, flow, frame maps, clip scores "
        "and tubelets of a sample of its videos.",
        example=INSPECT_EXAMPLE,
    )
    parser.add_argument("url", metavar="URL", help="folder of the shard set, at any fsspec URL")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="page to write")
    parser.add_argument("--videos", type=int, default=6, help="maximum number of videos to show (6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of videos and of their tubelets (0)")
    cache_help = "folder that caches the shards of a remote set (default: a temporary one)"
    parser.add_argument("--cache", metavar="DIR", help=cache_help)


def _run_inspect(args: argparse.Namespace) -> int:
    """Write the page and print its path; raises as `ShardSet`, and `UserError` for a file that cannot be written."""
    from dataloading.reading.shard_set import ShardSet
    from dataloading.visualize import inspect_video, sample_positions
    from launch.report.shard_set_page import shard_set_page
    from mcl_dist.storage.folder import Folder

    check_minimums(args, {"videos": 1, "seed": 0})
    with ExitStack() as stack:
        cache = args.cache or stack.enter_context(tempfile.TemporaryDirectory())
        shard_set = ShardSet(args.url, cache)
        positions = sample_positions(len(shard_set), args.videos, args.seed)
        videos = [inspect_video(shard_set, position, args.seed) for position in positions]
    Folder(str(args.out.parent)).write(args.out.name, shard_set_page(args.url, shard_set, videos, args.seed).encode())
    print(args.out)
    return 0

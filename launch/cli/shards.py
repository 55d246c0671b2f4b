"""`mcl shards`: its commands, and `mcl shards verify`."""

import argparse
import json
import sys

from dataloading.build.local_executor import num_cores
from launch.cli import build_shards, inspect_shards
from launch.cli.command import Commands, add_command
from mcl_dist.errors import EXIT_FAILURE, ConfigError, UserError

VERIFY_EXAMPLE = """\
example:
  mcl shards verify s3://bucket/train --json"""


def register(commands: Commands) -> None:
    """Add `mcl shards` and its commands."""
    shards = commands.add_parser("shards", help="build, check and look into shard sets")
    actions = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build_shards.register(actions)
    verify = add_command(
        actions,
        "verify",
        run_verify,
        help="check every byte of a shard set",
        description="Check the manifest, digests, index and stills of a shard set; prints one line per problem.",
        example=VERIFY_EXAMPLE,
    )
    verify.add_argument("url", metavar="URL", help="folder of the shard set, at any fsspec URL")
    verify.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        help="processes, each holding one shard in memory (default: one per core)",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    inspect_shards.register(actions)


def run_verify(args: argparse.Namespace) -> int:
    """Verify a shard set; the exit code is 1 if there is any problem."""
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
        print(problem, file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(vars(result)))
    else:
        verdict = f"{len(result.problems)} problems" if result.problems else "no problem found"
        print(f"{args.url}: {result.videos} videos in {result.shards} shards, {result.bytes} bytes: {verdict}")
    return EXIT_FAILURE if result.problems else 0

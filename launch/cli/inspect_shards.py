"""`mcl shards inspect`."""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from launch.cli.command import Commands, add_command
from mcl_dist.errors import ConfigError

EXAMPLE = """\
example:
  mcl shards inspect shards/train --out page.html --videos 10 --seed 3"""


def register(actions: Commands) -> None:
    """Add `inspect` to the commands of `mcl shards`."""
    parser = add_command(
        actions,
        "inspect",
        run,
        help="write an HTML page about a shard set",
        description="Write one self-contained HTML file: totals of the set, and frames, flow, frame maps, clip scores "
        "and tubelets of a sample of its videos.",
        example=EXAMPLE,
    )
    parser.add_argument("url", metavar="URL", help="folder of the shard set, at any fsspec URL")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="page to write")
    parser.add_argument("--videos", type=int, default=6, help="maximum number of videos to show (6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of videos and of their tubelets (0)")
    parser.add_argument(
        "--cache", metavar="DIR", help="folder that caches the shards of a remote set (default: a temporary one)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path; raises as `ShardSet`, and `UserError` for a file that cannot be written."""
    from dataloading.reading.shard_set import ShardSet
    from dataloading.visualize import inspect_video, sample_positions
    from launch.report.shard_set_page import shard_set_page
    from mcl_dist.storage.folder import Folder

    for option, least in (("videos", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ConfigError(f"--{option}: found {getattr(args, option)}, must be at least {least}")
    with ExitStack() as stack:
        cache = args.cache or stack.enter_context(tempfile.TemporaryDirectory())
        shard_set = ShardSet(args.url, cache)
        positions = sample_positions(len(shard_set), args.videos, args.seed)
        videos = [inspect_video(shard_set, position, args.seed) for position in positions]
    Folder(str(args.out.parent)).write(args.out.name, shard_set_page(args.url, shard_set, videos, args.seed).encode())
    print(args.out)
    return 0

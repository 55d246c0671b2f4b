"""Journal of an unfinished build: one small file per finished shard, removed once the manifest is written."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from dataloading.build.near_duplicates import VideoHash
from dataloading.shards.format import RefusedVideo, ShardEntry, index_name, sha256, shard_name
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

JOURNAL_NAME = re.compile(r"shard-\d{6,}\.done\.json")


@dataclass(frozen=True)
class FinishedShard:
    """One finished shard of an unfinished build.

    Attributes:
        build: build record of the set.
        entry: the manifest's entry of the shard.
        refused: videos refused since the shard before.
        num_processed: videos, in the order of the build, that were stored or refused up to this shard's end.
        hashes: perceptual hashes of the videos in this shard.
    """

    build: dict[str, Any]
    entry: ShardEntry
    refused: tuple[RefusedVideo, ...]
    num_processed: int
    hashes: tuple[VideoHash, ...]

    def write(self, destination: Folder) -> None:
        """Write the journal beside the shard; from then on a resumed build keeps the shard."""
        tree = asdict(self)  # with the keys of earlier versions, whose builds can be resumed
        tree |= {"taken": tree.pop("num_processed"), "looks": tree.pop("hashes")}
        destination.write(_journal_name(self.entry.name), json.dumps(tree, indent=1).encode() + b"\n")


def read_finished(destination: Folder, build: dict[str, Any]) -> list[FinishedShard]:
    """Read the finished shards of an earlier run of this build, up to the first missing or damaged one.

    Raises:
        UserError: they belong to a build of other videos or with another configuration.
    """
    names = set(destination.names())
    journals = {name: _read(destination, name) for name in sorted(names) if JOURNAL_NAME.fullmatch(name)}
    for shard in journals.values():
        if shard is not None:
            check_record(destination, "an unfinished build with", shard.build, build)
    finished: list[FinishedShard] = []
    while True:
        name = shard_name(len(finished))
        shard = journals.get(_journal_name(name))
        if shard is None or shard.entry.name != name or not _is_intact(destination, shard.entry, names):
            return finished
        finished.append(shard)


def remove_journals(destination: Folder) -> None:
    """Remove every journal; the manifest replaces them."""
    for name in destination.names():
        if JOURNAL_NAME.fullmatch(name):
            destination.remove(name)


def check_record(destination: Folder, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare two build records; raises `UserError` with the names of the keys that differ."""
    differing = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
    if differing:
        raise UserError(
            f"{destination.url}: holds {what} another {', '.join(differing)}; name another folder, or remove this one"
        )


def _journal_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.done.json"


def _read(destination: Folder, name: str) -> FinishedShard | None:
    """The journal, or None for one that a store without atomic writes cut off; its shard is built again."""
    try:
        tree = json.loads(destination.read(name))
        return FinishedShard(
            build=dict(tree["build"]),
            entry=ShardEntry(**tree["entry"]),
            refused=tuple(RefusedVideo(**video) for video in tree["refused"]),
            num_processed=int(tree["taken"]),
            hashes=tuple(VideoHash(**video) for video in tree["looks"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _is_intact(destination: Folder, entry: ShardEntry, names: set[str]) -> bool:
    index = index_name(entry.name)
    return (
        {entry.name, index} <= names
        and destination.size(entry.name) == entry.bytes
        and sha256(destination.read(index)) == entry.index_sha256
    )

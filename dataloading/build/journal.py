"""What an unfinished build has finished: a small file a shard, written after it and gone with the manifest's coming."""

from __future__ import annotations

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
    """One shard that needs no building any more.

    Attributes:
        build: the build record of the set it belongs to.
        entry: what the manifest will say of it.
        refused: videos refused since the shard before.
        taken: how many of the build's videos, in its order, are in this shard and those before, or were refused.
        looks: of the videos in this shard.
    """

    build: dict[str, Any]
    entry: ShardEntry
    refused: tuple[RefusedVideo, ...]
    taken: int
    looks: tuple[VideoHash, ...]

    def write(self, destination: Folder) -> None:
        """Note it beside its shard; from then on a build that starts again keeps the shard."""
        destination.write(_journal_name(self.entry.name), json.dumps(asdict(self), indent=1).encode() + b"\n")


def read_finished(destination: Folder, build: dict[str, Any]) -> list[FinishedShard]:
    """The finished shards of an earlier run of this build, from the first up to the first that is missing.

    Raises:
        UserError: they are of a build of other videos or of another configuration.
    """
    names = set(destination.names())
    noted = {name: _read(destination, name) for name in sorted(names) if JOURNAL_NAME.fullmatch(name)}
    for shard in noted.values():
        if shard is not None:
            check_record(destination, "an unfinished build with", shard.build, build)
    finished: list[FinishedShard] = []
    while True:
        name = shard_name(len(finished))
        shard = noted.get(_journal_name(name))
        if shard is None or shard.entry.name != name or not _is_whole(destination, shard.entry, names):
            return finished
        finished.append(shard)


def remove_journals(destination: Folder) -> None:
    """Remove every journal: the manifest says it all now."""
    for name in destination.names():
        if JOURNAL_NAME.fullmatch(name):
            destination.remove(name)


def check_record(destination: Folder, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare build records; `UserError` names what differs."""
    differing = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
    if differing:
        raise UserError(
            f"{destination.url}: holds {what} another {', '.join(differing)}; name another folder, or remove this one"
        )


def _journal_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.done.json"


def _read(destination: Folder, name: str) -> FinishedShard | None:
    try:
        tree = json.loads(destination.read(name))
        refused = tuple(RefusedVideo(**video) for video in tree["refused"])
        looks = tuple(VideoHash(**look) for look in tree["looks"])
        return FinishedShard(dict(tree["build"]), ShardEntry(**tree["entry"]), refused, int(tree["taken"]), looks)
    except (ValueError, KeyError, TypeError):
        return None  # torn by a store that does not write as a whole: its shard is built anew


def _is_whole(destination: Folder, entry: ShardEntry, names: set[str]) -> bool:
    index = index_name(entry.name)
    return (
        {entry.name, index} <= names
        and destination.size(entry.name) == entry.bytes
        and sha256(destination.read(index)) == entry.index_sha256
    )

"""Which videos of a source are the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dataloading.shards.format import sha256
from dataloading.videos.sources import SourceFolder
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

HEAD_BYTES = 65536  # files of one size that differ do so in their beginning, nearly always
READERS = 16  # what takes time is waiting for the disk or the store


def find_duplicates(sources: SourceFolder) -> dict[str, str]:
    """The path of each video whose bytes an earlier one has too, to the path of the first that has them.

    Only files of the same size are read, whole only where their beginnings agree.

    Raises:
        UserError: the store of the source failed. A file that is gone or may not be read is nobody's duplicate.
    """
    folder = Folder(sources.root)
    by_size: dict[int, list[str]] = {}
    for video in sources.videos:
        if video.size and not video.refusal:
            by_size.setdefault(video.size, []).append(video.path)
    groups = [paths for paths in by_size.values() if len(paths) > 1]
    with ThreadPoolExecutor(READERS) as pool:
        for digest in (lambda path: sha256(folder.head(path, HEAD_BYTES)), folder.sha256):
            groups = _split(groups, digest, pool)
    return {path: first for first, *others in groups for path in others}


def without(sources: SourceFolder, duplicates: Mapping[str, str]) -> SourceFolder:
    """The sources with their duplicates refused, each naming the video that is kept in its place."""
    videos = (
        replace(video, refusal=f"duplicate: the same bytes as {duplicates[video.path]}, which is kept")
        if video.path in duplicates and not video.refusal
        else video
        for video in sources.videos
    )
    return replace(sources, videos=tuple(videos))


def _split(groups: list[list[str]], digest: Callable[[str], str], pool: ThreadPoolExecutor) -> list[list[str]]:
    """Groups of two or more that agree in the digest too, in their old order."""
    together: dict[tuple[int, str], list[str]] = {}
    members = [(number, path) for number, paths in enumerate(groups) for path in paths]
    digests = pool.map(lambda member: _readable(digest, member[1]), members)
    for (number, path), found in zip(members, digests, strict=True):
        if found is not None:
            together.setdefault((number, found), []).append(path)
    return [paths for paths in together.values() if len(paths) > 1]


def _readable(digest: Callable[[str], str], path: str) -> str | None:
    try:
        return digest(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return None  # the build refuses it, and says why
        raise

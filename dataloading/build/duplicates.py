"""Find videos of a source that are the same file, byte for byte."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dataloading.shards.format import sha256
from dataloading.videos.sources import SourceFolder
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder

HEAD_BYTES = 65536  # different files of one size nearly always differ here
NUM_READERS = 16  # threads; they mostly wait for the disk or the store


def find_duplicates(sources: SourceFolder) -> dict[str, str]:
    """Map each path whose bytes an earlier video has too to the first path with these bytes.

    Reads only files of equal size, and in full only those with equal heads.

    Raises:
        UserError: the store of the source failed. A missing or unreadable file counts as no duplicate.
    """
    folder = Folder(sources.root)
    by_size: dict[int, list[str]] = {}
    for video in sources.videos:
        if video.size and not video.refusal:
            by_size.setdefault(video.size, []).append(video.path)
    groups = [paths for paths in by_size.values() if len(paths) > 1]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for digest in (lambda path: sha256(folder.head(path, HEAD_BYTES)), folder.sha256):
            groups = _split_by_digest(groups, digest, pool)
    return {path: first for first, *others in groups for path in others}


def refuse_duplicates(sources: SourceFolder, duplicates: Mapping[str, str]) -> SourceFolder:
    """The sources with every duplicate refused; the reason names the video that is kept."""
    videos = (
        replace(video, refusal=f"duplicate: the same bytes as {duplicates[video.path]}, which is kept")
        if video.path in duplicates and not video.refusal
        else video
        for video in sources.videos
    )
    return replace(sources, videos=tuple(videos))


def _split_by_digest(
    groups: list[list[str]], digest: Callable[[str], str], pool: ThreadPoolExecutor
) -> list[list[str]]:
    """Split the groups by digest, in their old order, and keep those with two or more paths."""
    by_digest: dict[tuple[int, str], list[str]] = {}
    members = [(number, path) for number, paths in enumerate(groups) for path in paths]
    digests = pool.map(lambda member: _digest_if_readable(digest, member[1]), members)
    for (number, path), found in zip(members, digests, strict=True):
        if found is not None:
            by_digest.setdefault((number, found), []).append(path)
    return [paths for paths in by_digest.values() if len(paths) > 1]


def _digest_if_readable(digest: Callable[[str], str], path: str) -> str | None:
    try:
        return digest(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return None  # the build refuses it with the reason
        raise

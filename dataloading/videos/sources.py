"""Which videos a shard set is built from: a folder of class folders, or what a list names below a folder."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from dataloading.shards.format import sha256
from dataloading.videos.decoder import EXTENSIONS
from dataloading.videos.video_lists import ListChoice, VideoList, read_list
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder


@dataclass(frozen=True)
class Source:
    """One video.

    Attributes:
        path: relative to the source folder.
        label: number of its class.
        size: of its file, in bytes.
        refusal: why it cannot be used, where the folder's listing tells already.
    """

    path: str
    label: int
    size: int = 0
    refusal: str = ""

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class SourceFolder:
    """The videos below one URL: class names by label, videos, number of other files."""

    root: str
    classes: tuple[str, ...]
    videos: tuple[Source, ...]
    num_others: int = 0

    @classmethod
    def scan(cls, root: str) -> SourceFolder:
        """Take the folders directly below as classes; hidden files and folders are passed over."""
        folder = Folder(root)
        files = {path: size for path, size in folder.files().items() if not _is_hidden(path)}
        classes = [name for name in folder.names() if not _is_hidden(name) and name not in files]
        labels = {name: label for label, name in enumerate(classes)}
        videos = [
            Source(path, labels[parts[0]], size)
            for path, size in sorted(files.items(), key=lambda file: file[0].split("/"))
            if len(parts := path.split("/")) == 2 and _is_video(path)
        ]
        return cls(root, tuple(classes), tuple(videos), len(files) - len(videos))

    @classmethod
    def listed(cls, root: str, listed: VideoList) -> SourceFolder:
        """Take the videos of a list, in its order; those that are not there are refused, each with the reason."""
        return cls(root, listed.classes, tuple(_located(Folder(root).files(), listed)))

    def digest(self) -> str:
        """sha256 of all that decides which videos of which classes are built."""
        videos = [(video.path, video.label, video.size, video.refusal) for video in self.videos]
        return sha256(json.dumps([self.classes, videos]).encode())


def scan_sources(root: str, choice: ListChoice | None = None) -> SourceFolder:
    """The videos of a folder of class folders, or those that a list names.

    Raises:
        UserError: the folder or the list is missing, holds no video, or the list cannot be read.
        ConfigError: as `read_list`.
    """
    if choice is not None:
        return SourceFolder.listed(root, read_list(choice))
    sources = SourceFolder.scan(root)
    if not sources.videos:
        raise UserError(f"{root}: no videos in its class folders; lay them out as CLASS/VIDEO.mp4, or give a --list")
    return sources


def _located(files: Mapping[str, int], listed: VideoList) -> Iterator[Source]:
    known: dict[str, str] = {path: path for path in files}
    for path in sorted(filter(_is_video, files)):
        known.setdefault(path[: -len(PurePosixPath(path).suffix)], path)
    taken = set()
    for video in listed.videos:
        places = [posixpath.normpath(place) for place in video.places]
        found = next((known[place] for place in places if place in known), None)
        if posixpath.isabs(video.path) or posixpath.normpath(video.path).split("/")[0] == "..":
            yield Source(video.path, video.label, refusal="outside: its path leaves SRC; list paths relative to SRC")
        elif found is None:
            yield Source(video.path, video.label, refusal="missing: no such file below SRC; fetch it or leave it out")
        elif found in taken:
            yield Source(found, video.label, refusal="listed twice: an earlier line names the same file; leave one out")
        else:
            taken.add(found)
            yield Source(found, video.label, files[found])


def _is_video(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in EXTENSIONS


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))

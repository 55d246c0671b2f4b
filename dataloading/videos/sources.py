"""Videos to build a shard set from: those of a folder of class folders, or those of a list."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from dataloading.shards.format import sha256
from dataloading.videos.decoder import EXTENSIONS
from dataloading.videos.video_lists import ListSpec, VideoList, read_list
from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder


@dataclass(frozen=True)
class Source:
    """One video.

    Attributes:
        path: relative to the source folder.
        label: label of its class.
        size: size of its file in bytes.
        refusal: why it cannot be used, if the listing already shows it; part of the digest, so its texts are stable.
    """

    path: str
    label: int
    size: int = 0
    refusal: str = ""

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class SourceFolder:
    """The videos below one URL: class names by label, videos, and the number of files that are not videos."""

    root: str
    classes: tuple[str, ...]
    videos: tuple[Source, ...]
    num_ignored: int = 0

    @classmethod
    def scan(cls, root: str) -> SourceFolder:
        """Find the videos of the class folders directly below `root`; ignores hidden files and folders."""
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
    def from_list(cls, root: str, video_list: VideoList) -> SourceFolder:
        """Find the videos of a list, in its order; a missing one is refused with the reason."""
        return cls(root, video_list.classes, tuple(_locate(Folder(root).files(), video_list)))

    def digest(self) -> str:
        """The sha256 of the classes and videos, with their labels, sizes and refusals."""
        videos = [(video.path, video.label, video.size, video.refusal) for video in self.videos]
        return sha256(json.dumps([self.classes, videos]).encode())


def find_videos(root: str, list_spec: ListSpec | None = None) -> SourceFolder:
    """Find the videos of a folder of class folders, or those of a list.

    Raises:
        UserError: the folder or the list is missing, holds no video, or the list cannot be read.
        ConfigError: as `read_list`.
    """
    if list_spec is not None:
        return SourceFolder.from_list(root, read_list(list_spec))
    sources = SourceFolder.scan(root)
    if not sources.videos:
        raise UserError(f"{root}: no videos in its class folders; lay them out as CLASS/VIDEO.mp4, or give a --list")
    return sources


def _locate(files: Mapping[str, int], video_list: VideoList) -> Iterator[Source]:
    known: dict[str, str] = {path: path for path in files}  # file by path, with or without its suffix
    for path in sorted(filter(_is_video, files)):
        known.setdefault(path[: -len(PurePosixPath(path).suffix)], path)
    used = set()
    for video in video_list.videos:
        candidates = map(posixpath.normpath, video.candidates)
        found = next((known[path] for path in candidates if path in known), None)
        if posixpath.isabs(video.path) or posixpath.normpath(video.path).split("/")[0] == "..":
            yield Source(video.path, video.label, refusal="outside: its path leaves SRC; list paths relative to SRC")
        elif found is None:
            yield Source(video.path, video.label, refusal="missing: no such file below SRC; fetch it or leave it out")
        elif found in used:
            yield Source(found, video.label, refusal="listed twice: an earlier line names the same file; leave one out")
        else:
            used.add(found)
            yield Source(found, video.label, files[found])


def _is_video(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in EXTENSIONS


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from dataloading.build.duplicates import HEAD_BYTES, find_duplicates, refuse_duplicates
from dataloading.videos.sources import find_videos
from dataloading.videos.video_lists import ListSpec
from mcl_dist.errors import UserError

LONG = bytes(range(256)) * (HEAD_BYTES // 256)
FILES = {
    "a/1.mp4": b"same",
    "a/2.mp4": b"else",
    "b/3.mp4": b"same",
    "b/4.avi": b"same",
    "b/5.mp4": b"",
    "b/6.mp4": b"",
    "c/7.mp4": LONG + b"x",
    "c/8.mp4": LONG + b"y",
    "c/9.mp4": LONG + b"x",
}
DUPLICATES = {"b/3.mp4": "a/1.mp4", "b/4.avi": "a/1.mp4", "c/9.mp4": "c/7.mp4"}


def write(folder: Path, files: Mapping[str, bytes] = FILES) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def test_files_with_equal_bytes_are_found_and_mapped_to_the_first(tmp_path: Path) -> None:
    assert find_duplicates(find_videos(write(tmp_path))) == DUPLICATES


def test_duplicates_are_found_in_a_remote_store() -> None:
    url = f"memory://{uuid4().hex}"
    for name, data in FILES.items():
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", data)
    assert find_duplicates(find_videos(url)) == DUPLICATES


def test_the_first_is_the_first_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("c/9.mp4 x\nb/4.avi x\na/1.mp4 x\nc/7.mp4 x\n")
    sources = find_videos(write(tmp_path / "source"), ListSpec(str(tmp_path / "list.txt")))
    assert find_duplicates(sources) == {"a/1.mp4": "b/4.avi", "c/7.mp4": "c/9.mp4"}


def test_dropped_duplicates_are_refused_and_change_the_digest_of_the_sources(tmp_path: Path) -> None:
    sources = find_videos(write(tmp_path))
    kept = refuse_duplicates(sources, DUPLICATES)
    refused = {video.path: video.refusal for video in kept.videos if video.refusal}
    assert refused.keys() == DUPLICATES.keys()
    assert refused["b/4.avi"] == "duplicate: the same bytes as a/1.mp4, which is kept"
    assert kept.digest() != sources.digest()


def test_a_file_removed_after_the_listing_is_no_duplicate(tmp_path: Path) -> None:
    sources = find_videos(write(tmp_path))
    (tmp_path / "a/1.mp4").unlink()
    assert find_duplicates(sources) == {"b/4.avi": "b/3.mp4", "c/9.mp4": "c/7.mp4"}


def test_a_failing_store_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_args: object, **_more: object) -> None:
        raise OSError("503 Slow Down")

    sources = find_videos(write(tmp_path))
    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.cat_file", unavailable)
    with pytest.raises(UserError, match="503 Slow Down"):
        find_duplicates(sources)

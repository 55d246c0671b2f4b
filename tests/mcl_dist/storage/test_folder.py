from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder, MissingFileError


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "set") if request.param == "file" else f"memory://{tmp_path.name}/set")


def test_a_written_file_is_read_listed_measured_and_removed(folder: Folder) -> None:
    assert folder.names() == []
    folder.write("b", b"12345")
    folder.write("a/inner", b"")
    assert (folder.read("b"), folder.size("b"), folder.exists("b")) == (b"12345", 5, True)
    assert folder.names() == ["a", "b"]
    folder.remove("a")
    folder.remove("b")
    folder.remove("b")
    assert folder.names() == []


def test_files_are_copied_to_and_from_the_folder(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"shard")
    folder.put(tmp_path / "source", "copy")
    folder.get("copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"shard"
    assert folder.names() == ["copy"]


def test_a_range_is_read_in_one_request_and_ends_with_the_file(folder: Folder) -> None:
    folder.write("shard", b"0123456789")
    assert folder.read_range("shard", 2, 5) == b"234"
    assert folder.read_range("shard", 8, 99) == b"89"
    with pytest.raises(MissingFileError, match=r"set/nothing: no such file"):
        folder.read_range("nothing", 0, 1)


def test_a_range_beyond_the_end_that_a_server_rejects_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    class RangeNotSatisfiableError(OSError):
        status = 416

    def reject(*_: object, **__: object) -> bytes:
        raise RangeNotSatisfiableError

    folder = Folder("memory://ranges")
    monkeypatch.setattr(folder.filesystem, "cat_file", reject)
    assert folder.read_range("shard", 10, 20) == b""


def test_a_server_that_ignores_ranges_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://ranges")
    monkeypatch.setattr(folder.filesystem, "cat_file", lambda *_, **__: b"the whole file")
    with pytest.raises(UserError, match=r"ranges/shard: the server sends 14 bytes for a range of 5; use a server"):
        folder.read_range("shard", 0, 5)


def test_a_missing_file_is_an_error_with_its_url(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"set/nothing: no such file"):
        folder.read("nothing")


def test_an_unknown_protocol_is_a_user_error() -> None:
    with pytest.raises(UserError, match="nonsense://x"):
        Folder("nonsense://x")


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write("state", b"old")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="state: no space left"):
        folder.write("state", b"new")
    assert folder.names() == ["state"]
    assert folder.read("state") == b"old"


def test_a_failed_copy_leaves_no_file(tmp_path: Path) -> None:
    source, target = Folder(f"memory://{tmp_path.name}"), tmp_path / "cache" / "shard"
    with pytest.raises(UserError, match="no such file"):
        source.get("shard", target)
    with pytest.raises(UserError, match="no such file"):
        Folder(str(tmp_path / "set")).put(tmp_path / "nothing", "shard")
    assert list(target.parent.iterdir()) == list((tmp_path / "set").iterdir()) == []


def test_errors_contain_urls_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^sftpp://host/set: ") as unknown:
        Folder("sftpp://user:s3cret@host/set")
    folder = Folder("memory://user:s3cret@host/set?key=s3cret")
    with pytest.raises(UserError, match=r"^memory://host/set") as missing:
        folder.read("nothing")

    def refuse(*_: object, **__: object) -> bytes:
        raise OSError("cannot reach https://user:s3cret@host/set/nothing?signature=s3cret")

    monkeypatch.setattr(folder.filesystem, "cat_file", refuse)
    with pytest.raises(UserError, match=r"cannot reach https://host/set/nothing$") as unreachable:
        folder.read("nothing")
    assert not [raised for raised in (unknown, missing, unreachable) if "s3cret" in str(raised.value)]


def test_an_error_gives_a_local_path_unchanged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/what\?/why@nothing: no such file"):
        Folder(str(tmp_path / "what?")).read("why@nothing")

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mcl_dist.errors import UserError
from mcl_dist.storage.folder import Folder


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "set") if request.param == "file" else f"memory://{tmp_path.name}/set")


def test_what_is_written_is_read_listed_measured_and_removed(folder: Folder) -> None:
    assert folder.names() == []
    folder.write("b", b"12345")
    folder.write("a/inner", b"")
    assert (folder.read("b"), folder.size("b"), folder.exists("b")) == (b"12345", 5, True)
    assert folder.names() == ["a", "b"]
    folder.remove("a")
    folder.remove("b")
    folder.remove("b")
    assert folder.names() == []


def test_files_go_up_and_come_down_whole(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"shard")
    folder.put(tmp_path / "source", "copy")
    folder.get("copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"shard"
    assert folder.names() == ["copy"]


def test_a_missing_file_is_named(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"set/nothing: no such file"):
        folder.read("nothing")


def test_an_unknown_protocol_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="nonsense://x"):
        Folder("nonsense://x")


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, target = Folder(f"memory://{tmp_path.name}"), tmp_path / "cache" / "shard"
    with pytest.raises(UserError, match="no such file"):
        source.get("shard", target)
    with pytest.raises(UserError, match="no such file"):
        Folder(str(tmp_path / "set")).put(tmp_path / "nothing", "shard")
    assert list(target.parent.iterdir()) == list((tmp_path / "set").iterdir()) == []


def test_errors_name_urls_without_their_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^sftpp://host/set: ") as unknown:
        Folder("sftpp://user:s3cret@host/set")
    folder = Folder("memory://user:s3cret@host/set?key=s3cret")
    with pytest.raises(UserError, match=r"^memory://host/set") as missing:
        folder.read("nothing")

    def refused(*_: object, **__: object) -> bytes:
        raise OSError("cannot reach https://user:s3cret@host/set/nothing?signature=s3cret")

    monkeypatch.setattr(folder._filesystem, "cat_file", refused)
    with pytest.raises(UserError, match=r"cannot reach https://host/set/nothing$") as unreachable:
        folder.read("nothing")
    assert not [raised for raised in (unknown, missing, unreachable) if "s3cret" in str(raised.value)]


def test_a_local_file_is_named_as_it_is_called(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/what\?/why@nothing: no such file"):
        Folder(str(tmp_path / "what?")).read("why@nothing")

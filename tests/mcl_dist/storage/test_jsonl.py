from __future__ import annotations

from pathlib import Path

import pytest

from mcl_dist.storage import jsonl


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def append_bytes(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_appended_records_are_read_in_order(path: Path) -> None:
    for number in range(3):
        jsonl.append(path, {"number": number, "text": "ü\n"})
    assert path.read_bytes().count(b"\n") == 3
    assert jsonl.read(path) == [{"number": number, "text": "ü\n"} for number in range(3)]


def test_a_missing_file_has_no_records_and_needs_no_repair(path: Path) -> None:
    assert jsonl.read(path) == []
    jsonl.truncate_incomplete_line(path)
    assert not path.exists()


@pytest.mark.parametrize("line", [b'{"number": 1', b'{"a": {"number": 2}', b"[1]", b"null", b"", b"\xff", b"\0\0\0\0"])
def test_a_line_without_a_whole_object_is_left_out(path: Path, line: bytes) -> None:
    assert jsonl.parse(line) is None
    path.write_bytes(b'{"number": 0}\n' + line + b'\n{"number": 3}\n')
    assert jsonl.read(path) == [{"number": 0}, {"number": 3}]


def test_only_lines_with_an_end_are_complete() -> None:
    assert jsonl.complete_lines(b"first\nsecond\nthi") == [b"first\n", b"second\n"]
    assert jsonl.complete_lines(b"fir") == []


@pytest.mark.parametrize(
    ("content", "repaired"), [(b"first\nsec", b"first\n"), (b"fir", b""), (b"first\n", b"first\n")]
)
def test_an_incomplete_last_line_is_cut_off(path: Path, content: bytes, repaired: bytes) -> None:
    path.write_bytes(content)
    jsonl.truncate_incomplete_line(path)
    assert path.read_bytes() == repaired


def test_a_tail_returns_each_line_once_and_only_when_it_is_complete(path: Path) -> None:
    tail = jsonl.Tail(path)
    assert tail.new_lines() == []
    append_bytes(path, b"first\nsec")
    assert tail.new_lines() == [b"first\n"]
    assert tail.new_lines() == []
    append_bytes(path, b"ond\nthird\n")
    assert tail.new_lines() == [b"second\n", b"third\n"]


@pytest.mark.parametrize(
    ("content", "is_valid"), [(b"first\nsecond\nthird\n", True), (b"first\n", False), (b"first\nother!\n", False)]
)
def test_a_tail_notices_that_the_lines_it_has_read_were_replaced(path: Path, content: bytes, is_valid: bool) -> None:
    tail = jsonl.Tail(path)
    assert tail.is_valid(), "nothing read yet"
    path.write_bytes(b"first\nsecond\n")
    tail.new_lines()
    path.write_bytes(content)
    assert tail.is_valid() == is_valid


def test_a_tail_notices_that_its_file_is_gone(path: Path) -> None:
    tail = jsonl.Tail(path)
    append_bytes(path, b"first\n")
    tail.new_lines()
    path.unlink()
    assert not tail.is_valid()

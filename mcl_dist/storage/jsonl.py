"""Local files of JSON lines: one object a line, appended while others read.

A killed process or a full disk leaves the last line incomplete. If the file is appended to without a repair, the
incomplete line and the next one form a single unreadable line. Readers leave both kinds of lines out.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line.

    Raises:
        OSError: the file cannot be written; an incomplete line may remain.
    """
    line = json.dumps(record) + "\n"
    with path.open("a") as file:
        file.write(line)


def read(path: Path) -> list[Record]:
    """All records of a file, without unreadable lines; none if the file does not exist."""
    return list(parse_all(path.read_bytes().splitlines())) if path.exists() else []


def parse_all(lines: Iterable[bytes | str]) -> Iterator[Record]:
    """The records of all readable lines."""
    return (record for record in map(parse, lines) if record is not None)


def parse(line: bytes | str) -> Record | None:
    """The record of a line; None if the line is not a JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def complete_lines(data: bytes) -> list[bytes]:
    """Lines with their line ends, without an incomplete last line."""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def truncate_incomplete_line(path: Path) -> None:
    """Cut an incomplete last line off a file, so that the next line stays readable."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


class Tail:
    """Reads the lines that were added to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._last_line = 0, b""

    def is_valid(self) -> bool:
        """Whether the lines read so far are still in the file: a run that resumes drops the steps it will repeat."""
        if not self._offset:
            return True
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last_line))
                return file.read(len(self._last_line)) == self._last_line
        except FileNotFoundError:
            return False

    def new_lines(self) -> list[bytes]:
        """Complete lines that no earlier call has returned; none if the file does not exist."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = complete_lines(file.read())
        except FileNotFoundError:
            return []
        if lines:
            self._offset, self._last_line = self._offset + sum(map(len, lines)), lines[-1]
        return lines

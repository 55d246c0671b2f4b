"""The history of a run from its folder, while it runs and after."""

from __future__ import annotations

import fcntl
import heapq
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcl_dist.errors import UserError
from monitoring.history.fold import History
from monitoring.history.run_view import RunView

METRICS, LOG, LOCK = "metrics.jsonl", "log.jsonl", "lock"
OTHER_LOGS = "log-[0-9]*.jsonl"
LAST_BYTES = 65536  # of another rank's log, in which its newest report stands


class RunFolder:
    """A run's files, read on from where the last look ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def view(self) -> RunView:
        """The run as its files tell it now.

        Raises:
            UserError: there is no such folder, or no run has written there.
        """
        history = self.history()
        view = history.view(alive=_is_held(self._folder / LOCK))
        if self._num_unreadable:
            view["warnings"].append(f"{self._num_unreadable} lines of {METRICS} and {LOG} cannot be read, left out")
        return view

    def history(self) -> History:
        """All lines so far, folded; errors as in `view`."""
        if not self._folder.is_dir():
            raise UserError(f"{self._folder}: no such run folder; give the run.dir of a run")
        if not any((self._folder / name).exists() for name in (METRICS, LOG)):
            raise UserError(f"{self._folder}: no {METRICS} and no {LOG}: no run has written there yet")
        if not (self._steps.goes_on() and self._events.goes_on()):
            self._begin()
        lines = [
            sorted(self._readable(self._steps, self._history.take_step), key=_when),
            sorted(self._readable(self._events, self._history.take_event), key=_when),
        ]
        for _, take, line in heapq.merge(*lines, key=_when):
            self._take(take, line)
        for path in sorted(self._folder.glob(OTHER_LOGS)):
            self._hear_other(path)
        return self._history

    def _begin(self) -> None:
        self._history = History(self._folder.resolve().name, f"run folder {self._folder}")
        self._steps, self._events = _Tail(self._folder / METRICS), _Tail(self._folder / LOG)
        self._other_sizes: dict[Path, int] = {}
        self._num_unreadable = 0

    def _readable(self, tail: _Tail, take: Callable[[dict[str, Any]], None]) -> Iterator[Told]:
        for text in tail.new_lines():
            line = _parsed(text)
            if line is None:
                self._num_unreadable += 1
            else:
                yield line.get("time") or 0.0, take, line

    def _take(self, take: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
        try:
            take(line)
        except (KeyError, TypeError, ValueError):
            self._num_unreadable += 1

    def _hear_other(self, path: Path) -> None:
        size = path.stat().st_size
        if self._other_sizes.get(path) == size:
            return
        self._other_sizes[path] = size
        with path.open("rb") as file:
            file.seek(max(0, size - LAST_BYTES))
            lines = map(_parsed, file.read().splitlines())
        reports = [line for line in lines if line and line.get("event") == "LoaderReport"]
        if reports:
            self._history.take_event(reports[-1], rank=int(path.stem.removeprefix("log-")))


Told = tuple[float, Callable[[dict[str, Any]], None], dict[str, Any]]


class _Tail:
    """Whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._last = 0, b""

    def goes_on(self) -> bool:
        """Whether what was read is still there: a run that resumes drops the steps that it will repeat."""
        if not self._offset:
            return True
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                return file.read(len(self._last)) == self._last
        except FileNotFoundError:
            return False

    def new_lines(self) -> list[bytes]:
        """Lines with an end that were not handed out before."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        lines = added[: added.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self._offset, self._last = self._offset + sum(map(len, lines)), lines[-1]
        return lines


def _when(told: Told) -> float:
    return told[0]


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _is_held(lock: Path) -> bool | None:
    """Whether a process holds the run's lock; none where that cannot be told."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False

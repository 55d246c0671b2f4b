"""The history of a run from its folder, during and after the run."""

import fcntl
import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcl_dist.errors import UserError
from mcl_dist.storage import jsonl
from monitoring.history.fold import History
from monitoring.history.run_view import RunView

METRICS, LOG, LOCK = "metrics.jsonl", "log.jsonl", "lock"
OTHER_LOGS = "log-[0-9]*.jsonl"
TAIL_BYTES = 65536  # of another rank's log; contains its newest report

AddRecord = Callable[[jsonl.Record], None]
TimedRecord = tuple[float, AddRecord, jsonl.Record]


class RunFolder:
    """A run's files; each call reads only the lines added since the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reset()

    def view(self) -> RunView:
        """The run's current view.

        Raises:
            UserError: the folder does not exist, or no run has written to it.
        """
        self._update()
        view = self._history.view(alive=_is_locked(self._folder / LOCK))
        if self._num_unreadable:
            view["warnings"].append(f"{self._num_unreadable} lines of {METRICS} and {LOG} cannot be read, left out")
        return view

    def _reset(self) -> None:
        self._history = History(self._folder.resolve().name, f"run folder {self._folder}")
        self._steps, self._events = jsonl.Tail(self._folder / METRICS), jsonl.Tail(self._folder / LOG)
        self._other_sizes: dict[Path, int] = {}
        self._num_unreadable = 0

    def _update(self) -> None:
        """Add all new lines to the history; errors as in `view`."""
        if not self._folder.is_dir():
            raise UserError(f"{self._folder}: no such run folder; give the run.dir of a run")
        if not any((self._folder / name).exists() for name in (METRICS, LOG)):
            raise UserError(f"{self._folder}: no {METRICS} and no {LOG}: no run has written there yet")
        if not (self._steps.is_valid() and self._events.is_valid()):
            self._reset()
        records = [
            sorted(self._new_records(self._steps, self._history.add_step), key=_time),
            sorted(self._new_records(self._events, self._history.add_event), key=_time),
        ]
        for _, add, record in heapq.merge(*records, key=_time):
            self._add(add, record)
        for path in sorted(self._folder.glob(OTHER_LOGS)):
            self._read_other_rank(path)

    def _new_records(self, tail: jsonl.Tail, add: AddRecord) -> Iterator[TimedRecord]:
        for line in tail.new_lines():
            record = jsonl.parse(line)
            if record is None:
                self._num_unreadable += 1
            else:
                yield record.get("time") or 0.0, add, record

    def _add(self, add: AddRecord, record: dict[str, Any]) -> None:
        try:
            add(record)
        except (KeyError, TypeError, ValueError):
            self._num_unreadable += 1

    def _read_other_rank(self, path: Path) -> None:
        """Add the newest loader report of another rank's log."""
        size = path.stat().st_size
        if self._other_sizes.get(path) == size:
            return
        self._other_sizes[path] = size
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            records = jsonl.parse_all(file.read().splitlines())
        reports = [record for record in records if record.get("event") == "LoaderReport"]
        if reports:
            self._history.add_event(reports[-1], rank=int(path.stem.removeprefix("log-")))


def _time(record: TimedRecord) -> float:
    return record[0]


def _is_locked(lock: Path) -> bool | None:
    """Whether a process holds the run's lock; None if that is unknown."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False

"""The bad samples of a run: counted by reason and logged in a file."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataloading.shards.bad_sample import BadSampleError
from mcl_dist.storage import jsonl


class BadSampleLog:
    """Logs each bad sample once for each reason, also over restarts of a run.

    Attributes:
        by_reason: number of bad samples that this process has met, by reason.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._logged = _read(file) if file is not None else set()
        self._met: set[tuple[str, str, str]] = set()
        self.by_reason: Counter[str] = Counter()

    @property
    def num_samples(self) -> int:
        """Number of different samples that this process has met."""
        return len({(shard, key) for shard, key, _ in self._met})

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a `bad_sample_record` from the batch of `step`."""
        identity = _identity(record)
        if identity not in self._met:
            self._met.add(identity)
            self.by_reason[record["reason"]] += 1
        if self._file is not None and identity not in self._logged:
            self._logged.add(identity)
            jsonl.append(self._file, {"step": step, **record})


def bad_sample_record(error: BadSampleError) -> dict[str, Any]:
    """A bad sample in JSON's types."""
    return {"shard": error.shard, "key": error.key, "reason": error.reason, "message": str(error)}


def _read(file: Path) -> set[tuple[str, str, str]]:
    file.parent.mkdir(parents=True, exist_ok=True)
    jsonl.truncate_incomplete_line(file)
    return {_identity(record) for record in jsonl.read(file)}


def _identity(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record["shard"], record["key"], record["reason"]

"""The bad samples of a run: listed in a file, counted, and held against the budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataloading.shards.bad_sample import BadSampleError


class BadSampleLog:
    """Each bad sample once for each thing that is wrong with it, also over restarts of a run.

    Attributes:
        by_reason: how many of these this process has met.
        num_samples: how many different samples they are.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._listed = _read(file) if file is not None else set()
        self._met: set[tuple[str, str, str]] = set()
        self.by_reason: Counter[str] = Counter()

    @property
    def num_samples(self) -> int:
        """Different samples among those met."""
        return len({place[:2] for place in self._met})

    def add(self, step: int, found: Mapping[str, Any]) -> None:
        """Take in what `described` says of one, met while making the batch of `step`."""
        place = (found["shard"], found["key"], found["reason"])
        if place not in self._met:
            self._met.add(place)
            self.by_reason[found["reason"]] += 1
        if self._file is not None and place not in self._listed:
            self._listed.add(place)
            with self._file.open("a") as lines:
                lines.write(json.dumps({"step": step, **found}) + "\n")


def described(error: BadSampleError) -> dict[str, Any]:
    """An entry of the list, in JSON's types."""
    return {"shard": error.shard, "key": error.key, "reason": error.reason, "message": str(error)}


def _read(file: Path) -> set[tuple[str, str, str]]:
    """What is listed already; a last line cut off by a kill is ended, so that the next one is whole."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        return set()
    text = file.read_text()
    if text and not text.endswith("\n"):
        file.write_text(text[: text.rfind("\n") + 1])
    entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {(entry["shard"], entry["key"], entry["reason"]) for entry in entries}

"""What happened to a run, in a person's words, from the lines of its `log.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monitoring.history.run_view import Message

NAMED = 3  # samples of a message; the log has them all
Line = Mapping[str, Any]


def message(line: Line) -> Message | None:
    """What a person reads of this event; none of those that come all the time."""
    known = _WORDS.get(line["event"])
    if known is None:
        return None
    level, words = known
    return Message(time=line["time"], level=level, text=words(line))


def _started(line: Line) -> str:
    start = f"resumed after step {line['step']:,}" if line["resumed_from"] else "started"
    return f"{start}, {line['total_steps']:,} steps in all"


def _skipped(line: Line) -> str:
    named = ", ".join(map(str, line["samples"][:NAMED])) or "no sample named"
    more = f" and {len(line['samples']) - NAMED} more" if line["samples"][NAMED:] else ""
    return f"step {line['step']:,} skipped, {line['reason']}: {named}{more}"


def _spike(line: Line) -> str:
    back = line["rolled_back_to"]
    answer = "" if back is None else f", went back to the checkpoint of step {back:,}"
    return f"step {line['step']:,}: the loss leapt to {line['loss']:.3f}{answer}"


_WORDS: Mapping[str, tuple[str, Callable[[Line], str]]] = {
    "Started": ("info", _started),
    "StepSkipped": ("warning", _skipped),
    "LossSpike": ("warning", _spike),
    "CheckpointFailed": ("error", lambda line: f"checkpoint of step {line['step']:,} not written: {line['reason']}"),
    "CheckpointRefused": ("warning", lambda line: f"{line['url']} refused: {line['reason']}"),
    "Restarted": ("warning", lambda line: f"restarted after {line['cause']}, {line['lost_seconds']:.0f} s lost"),
    "Stopping": ("info", lambda line: f"stopping after step {line['step']:,}: {line['reason']}"),
    "Notice": ("info", lambda line: str(line["text"])),
    "Finished": ("info", lambda line: f"finished {line['step']:,} steps"),
    "Failed": ("error", lambda line: str(line["reason"])),
}

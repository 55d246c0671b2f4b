"""Messages for people from the records of a run's `log.jsonl`."""

from collections.abc import Callable, Mapping
from typing import Any

from monitoring.history.run_view import Message

MAX_SAMPLES = 3  # samples in a message; the log has all
Record = Mapping[str, Any]


def event_message(record: Record) -> Message | None:
    """The message of an event; None for frequent events, which have no message."""
    if record["event"] not in _FORMATS:
        return None
    level, text = _FORMATS[record["event"]]
    return Message(time=record["time"], level=level, text=text(record))


def _started(record: Record) -> str:
    start = f"resumed after step {record['step']:,}" if record["resumed_from"] else "started"
    return f"{start}, {record['total_steps']:,} steps in total"


def _skipped(record: Record) -> str:
    samples = ", ".join(map(str, record["samples"][:MAX_SAMPLES])) or "no sample named"
    more = f" and {len(record['samples']) - MAX_SAMPLES} more" if record["samples"][MAX_SAMPLES:] else ""
    return f"step {record['step']:,} skipped, {record['reason']}: {samples}{more}"


def _spike(record: Record) -> str:
    back = record["rolled_back_to"]
    rollback = "" if back is None else f"; rolled back to the checkpoint of step {back:,}"
    return f"step {record['step']:,}: loss spike: {record['loss']:.3f}{rollback}"


_FORMATS: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "Started": ("info", _started),
    "StepSkipped": ("warning", _skipped),
    "LossSpike": ("warning", _spike),
    "CheckpointFailed": ("error", lambda record: f"checkpoint of step {record['step']:,} failed: {record['reason']}"),
    "CheckpointRefused": ("warning", lambda record: f"{record['url']} rejected: {record['reason']}"),
    "Restarted": ("warning", lambda record: f"restarted after {record['cause']}, {record['lost_seconds']:.0f} s lost"),
    "Stopping": ("info", lambda record: f"stopping after step {record['step']:,}: {record['reason']}"),
    "Notice": ("info", lambda record: str(record["text"])),
    "Finished": ("info", lambda record: f"finished {record['step']:,} steps"),
    "Failed": ("error", lambda record: str(record["reason"])),
}

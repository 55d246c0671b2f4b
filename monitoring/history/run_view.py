"""The view of a run as plain data: the only input of the terminal monitor, the web page and `--json`."""

from typing import Any, TypedDict

from monitoring.history.curves import Columns

VERSION = 2
STALL_FACTOR = 10  # a run stalls when a step takes this many times the median and at least STALL_SECONDS
STALL_SECONDS = 60.0
STARVED_RATIO = 0.2  # of a step spent waiting for data


class Checkpoint(TypedDict):
    """The newest complete checkpoint; unknown fields are None."""

    step: int
    time: float | None
    seconds: float | None
    stall_seconds: float | None
    bytes: int | None


class RankView(TypedDict):
    """One rank; unknown fields are None.

    Attributes:
        time: Unix seconds of its last report.
        wait_ratio: share of its time spent waiting for data.
        queue: batches that are ready.
        bad_samples, retries: counts since its start.
    """

    rank: int
    node: str
    time: float | None
    step: int | None
    step_seconds: float | None
    wait_ratio: float | None
    queue: int | None
    bad_samples: int | None
    retries: int | None


class Message(TypedDict):
    """An event for people to read; `level` is `info`, `warning` or `error`."""

    time: float | None
    level: str
    text: str


class RunView(TypedDict):
    """A run at one moment.

    Attributes:
        version: of these fields.
        source: origin of the values.
        now, started, updated: Unix seconds of this view, of the newest start and of the newest step.
        state: `waiting` (nothing yet), `starting`, `running`, `evaluating`, `stalled`, `stopping`, `stopped`,
            `finished`, `failed`.
        why: details of the state, or empty.
        seconds_left: at the median duration of the newest steps.
        latest: values of the newest step; a skipped step may have None.
        phases: mean seconds of the newest steps, by phase.
        whole, recent: values by step, of the whole run and of the newest steps.
        evaluations: online kNN accuracies by step: `top1`, `top5`, `mean_class`, and the duration `seconds`.
        counts: `skipped`, `skipped_in_a_row`, `spikes`, `starts`, `checkpoints_failed`, `checkpoints_failed_in_a_row`.
        loader: totals over the ranks that have reported: `expected`, `delivered`, `replaced`, `unaccounted`, `queue`,
            `bad_samples` and `retries` by reason, `cache_hits`, `cache_misses`, `bytes_read`.
        restarts: counts by cause.
        goodput: productive share of the wall time.
        warnings: current problems, most urgent first.
    """

    version: int
    run: str
    source: str
    now: float
    started: float | None
    updated: float | None
    state: str
    why: str
    step: int
    total_steps: int | None
    epoch: int | None
    seconds_left: float | None
    latest: dict[str, float | None]
    phases: dict[str, float]
    whole: Columns
    recent: Columns
    evaluations: Columns
    counts: dict[str, int]
    checkpoint: Checkpoint | None
    loader: dict[str, Any] | None
    ranks: list[RankView]
    restarts: dict[str, int]
    goodput: float | None
    warnings: list[str]
    messages: list[Message]


def known_median(values: list[float | None]) -> float | None:
    """The upper median of the known values."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def stall_timeout(step_seconds: float | None) -> float:
    """Seconds without a step after which a run counts as stalled."""
    return max(STALL_SECONDS, STALL_FACTOR * (step_seconds or 0.0))


def active_warnings(view: RunView) -> list[str]:
    """Current problems, most urgent first."""
    counts, loader = view["counts"], view["loader"] or {}
    waiting = known_median(view["recent"]["values"].get("data_wait_ratio", []))
    checks = [
        (view["state"] in ("stalled", "failed"), f"{view['state']}: {view['why']}"),
        (counts["skipped_in_a_row"], f"non-finite steps in a row: {counts['skipped_in_a_row']}"),
        (
            counts["checkpoints_failed_in_a_row"],
            f"failed checkpoints in a row: {counts['checkpoints_failed_in_a_row']}",
        ),
        (loader.get("unaccounted"), f"samples unaccounted for: {loader.get('unaccounted')}"),
        (waiting is not None and waiting > STARVED_RATIO, f"{waiting or 0:.0%} of a step is spent waiting for data"),
    ]
    return [text for applies, text in checks if applies]

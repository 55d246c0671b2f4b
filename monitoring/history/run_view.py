"""What a person wants to know of a run, as plain data: a terminal, a page and `--json` show this and nothing else."""

from __future__ import annotations

from typing import Any, TypedDict

from monitoring.history.curves import Columns

VERSION = 2
QUIET_STEPS = 10  # a step that takes this many times the usual one, and a minute, is none: the run stalls
QUIET_SECONDS = 60.0
STARVED_RATIO = 0.2  # of a step spent waiting for data


class Checkpoint(TypedDict):
    """The newest complete checkpoint; what is not known is none."""

    step: int
    time: float | None
    seconds: float | None
    stall_seconds: float | None
    bytes: int | None


class RankView(TypedDict):
    """What is known of one rank; what is not known is none.

    `time` is its last word; `wait_ratio` the share of its time spent waiting for data; `queue` its batches that are
    ready; `bad_samples` and `retries` count from its start.
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
    """Something that happened; `level` is `info`, `warning` or `error`."""

    time: float | None
    level: str
    text: str


class RunView(TypedDict):
    """A run at one moment.

    Attributes:
        version: of this form.
        source: where these figures come from.
        now, started, updated: Unix seconds: of this view, of the newest start, of the newest step.
        state: `waiting` (nothing yet), `starting`, `running`, `evaluating`, `stalled`, `stopping`, `stopped`,
            `finished`, `failed`; `why` says more where there is more to say.
        seconds_left: at the pace of the newest steps.
        latest: figures of the newest step; those of a step that was skipped may be none.
        phases: mean seconds of the newest steps, by phase.
        whole, recent: the figures by step.
        evaluations: accuracies on held-out videos by step: `top1`, `top5`, `mean_class`, and the `seconds` it took.
        counts: `skipped`, `skipped_in_a_row`, `spikes`, `starts`, `checkpoints_failed`, `checkpoints_failed_in_a_row`.
        loader: what has fed the ranks that are known: `expected`, `delivered`, `replaced`, `unaccounted`, `queue`,
            `bad_samples` and `retries` by reason, `cache_hits`, `cache_misses`, `bytes_read`.
        restarts: by cause; `goodput` is the share of the time that went into steps that count.
        warnings: what a person should look at now.
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


def usual(values: list[float | None]) -> float | None:
    """The median of what is there."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def quiet_limit(step_seconds: float | None) -> float:
    """Seconds without a step after which a run counts as stalled."""
    return max(QUIET_SECONDS, QUIET_STEPS * (step_seconds or 0.0))


def warnings_of(view: RunView) -> list[str]:
    """What a person should look at now, most pressing first."""
    counts, loader = view["counts"], view["loader"] or {}
    waiting = usual(view["recent"]["values"].get("data_wait_ratio", []))
    found = [
        (view["state"] in ("stalled", "failed"), f"{view['state']}: {view['why']}"),
        (counts["skipped_in_a_row"], f"steps in a row that were not finite: {counts['skipped_in_a_row']}"),
        (
            counts["checkpoints_failed_in_a_row"],
            f"checkpoints in a row that could not be written: {counts['checkpoints_failed_in_a_row']}",
        ),
        (loader.get("unaccounted"), f"samples unaccounted for: {loader.get('unaccounted')}"),
        (
            waiting is not None and waiting > STARVED_RATIO,
            f"{waiting or 0:.0%} of a step is spent waiting for data",
        ),
    ]
    return [text for is_so, text in found if is_so]

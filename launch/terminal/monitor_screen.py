"""Terminal screen of a run view: as much as fits, most important first."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise, zip_longest
from textwrap import wrap
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from launch.terminal.units import (
    UNKNOWN,
    format_bytes,
    format_counts,
    format_duration,
    format_number,
    format_percent,
    printable,
)
from mcl_dist.run_log.listeners import SCORE_LABELS
from monitoring.history.curves import Columns
from monitoring.history.run_view import RankView, RunView

WIDE = 120  # columns from which the layout has two columns
GAP = 3
TALL = 40  # lines from which sparklines are higher
LABEL_WIDTH, VALUE_WIDTH = 14, 10
LEVELS = " ▁▂▃▄▅▆▇█"  # of a sparkline
EIGHTHS = len(LEVELS) - 1
STATE_STYLES = {
    "running": "bold green",
    "finished": "bold green",
    "starting": "bold cyan",
    "evaluating": "bold cyan",
    "waiting": "bold cyan",
    "stopping": "bold yellow",
    "stopped": "bold yellow",
    "stalled": "bold red",
    "failed": "bold red",
}
LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "red"}
PHASE_STYLES = ("red", "blue", "green", "magenta", "cyan", "yellow", "white")
VALUES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("videos_per_second", "videos/s", format_number),
    ("seconds", "step time", format_duration),
    ("data_wait_ratio", "data wait", format_percent),
    ("gradient_norm", "gradient norm", format_number),
    ("learning_rate", "learning rate", format_number),
)
Lines = list[Text]


class MonitorScreen:
    """Rich renderable of a run view; `error` states why it is outdated, `fit_height` cuts it to the terminal."""

    def __init__(self, view: RunView, error: str = "", *, fit_height: bool = False) -> None:
        self._view, self._error, self._fit_height = view, error, fit_height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield lines no wider than the terminal."""
        height = console.height if self._fit_height else None
        for line in screen_lines(self._view, options.max_width, height, self._error):
            line.truncate(options.max_width, overflow="ellipsis")
            yield line


def screen_lines(view: RunView, width: int, height: int | None, error: str = "") -> Lines:
    """Lines for a screen of `width` columns; at most `height` of them, if given."""
    is_tall = height is not None and height >= TALL
    lines = [_title(view, width), _progress(view, width)]
    for text in filter(None, [error, *view["warnings"]]):
        lines += [
            Text(line, style="bold yellow") for line in wrap(f"! {printable(text)}", width, subsequent_indent="  ")
        ]
    if width >= WIDE:
        half = (width - GAP) // 2
        status = _status(view, half) + _ranks(view["ranks"], view["now"], 16 if is_tall else 8, half)
        lines += _side_by_side(_sparklines(view, half, 3 if is_tall else 1), status, half)
    else:
        lines += _sparklines(view, width, 2 if is_tall else 1) + _status(view, width)
        lines += _ranks(view["ranks"], view["now"], 8 if is_tall else 1, width)
    return (lines + _messages(view, None if height is None else height - len(lines)))[:height]


def _title(view: RunView, width: int) -> Text:
    state = Text(view["state"], style=STATE_STYLES[view["state"]])
    if view["state"] in ("stopped", "stopping", "evaluating") and view["why"]:
        state.append(f": {printable(view['why'])}", style="not bold")
    if view["updated"] is not None:
        state.append(f"  last step {_ago(view['updated'], view['now'])}", style="not bold dim")
    name = Text(printable(view["run"]), style="bold")
    name.truncate(max(8, width - len(state) - 2), overflow="ellipsis")
    return Text.assemble(name, " " * max(2, width - len(name) - len(state)), state)


def _progress(view: RunView, width: int) -> Text:
    step, total = view["step"], view["total_steps"]
    text = f"step {step:,}" + (f" of {total:,}" if total else "")
    if view["epoch"] is not None:
        text += f"  epoch {view['epoch']}"
    if view["state"] not in ("finished", "failed", "stopped") and view["seconds_left"] is not None:
        text += f"  {format_duration(view['seconds_left'])} left"
    bar_width = max(0, width - len(text) - 8)
    fraction = min(1.0, step / total) if total else 0.0
    done = round(fraction * bar_width)
    return Text.assemble(("━" * done, "green"), ("─" * (bar_width - done), "dim"), f" {fraction:4.0%}  ", text)


def _sparklines(view: RunView, width: int, height: int) -> Lines:
    """Losses and VALUES: label, newest value and sparkline."""
    values = view["whole"]["values"]
    terms = [name for name in values if name.startswith("loss")]
    losses = [(name, name.removeprefix("loss_").replace("loss", "total loss"), format_number) for name in terms]
    lines = []
    for name, label, formatted in (*losses, *VALUES):
        rows = sparkline(values.get(name, []), max(4, width - LABEL_WIDTH - VALUE_WIDTH - 2), height)
        for row, curve in enumerate(rows):
            is_last = row == height - 1
            text = f"{label:{LABEL_WIDTH}}" if is_last else " " * LABEL_WIDTH
            value = formatted(view["latest"].get(name)) if is_last else ""
            lines.append(Text.assemble((text, "dim"), f"{value:>{VALUE_WIDTH}}  ", (curve, "cyan")))
    return lines


def _status(view: RunView, width: int) -> Lines:
    counts = view["counts"]
    health = [f"skipped {counts['skipped']:,}", f"loss spikes {counts['spikes']:,}"]
    health.append(f"restarts {format_counts(view['restarts'])}" if view["restarts"] else f"starts {counts['starts']:,}")
    if view["goodput"] is not None:
        health.append(f"goodput {format_percent(view['goodput'])}")
    lines = _phases(view["phases"], width)
    if view["loader"]:
        lines += _row("data", _loader(view["loader"]), width)
    if view["evaluations"]["step"]:
        lines += _row("online kNN", _newest_scores(view["evaluations"]), width)
    return lines + _row("checkpoint", _checkpoint(view), width) + _row("steps", health, width)


def _checkpoint(view: RunView) -> list[str]:
    newest, failed = view["checkpoint"], view["counts"]["checkpoints_failed"]
    parts = ["none yet"]
    if newest is not None:
        optional = (
            (newest["time"], _ago(newest["time"] or 0.0, view["now"])),
            (newest["seconds"], f"took {format_duration(newest['seconds'])}"),
            (newest["stall_seconds"], f"stall {format_duration(newest['stall_seconds'])}"),
            (newest["bytes"], format_bytes(newest["bytes"])),
        )
        parts = [f"step {newest['step']:,}", *(text for value, text in optional if value is not None)]
    return parts + ([f"{failed:,} failed"] if failed else [])


def _newest_scores(evaluations: Columns) -> list[str]:
    newest = {name: column[-1] for name, column in evaluations["values"].items()}
    scores = [f"{name} {format_percent(newest.get(key))}" for key, name in SCORE_LABELS.items()]
    return [*scores, f"step {evaluations['step'][-1]:,}", f"took {format_duration(newest.get('seconds'))}"]


def _loader(loader: Mapping[str, Any]) -> list[str]:
    reads = loader["cache_hits"] + loader["cache_misses"]
    parts = [f"{loader['queue']:,} batches ready", f"bad {format_counts(loader['bad_samples'])}"]
    parts.append(f"retries {format_counts(loader['retries'])}")
    return parts + ([f"cache hits {format_percent(loader['cache_hits'] / reads)}"] if reads else [])


def _row(label: str, parts: Sequence[str], width: int) -> Lines:
    return _wrapped(label, [Text(printable(part)) for part in parts], " · ", width)


def _wrapped(label: str, parts: Sequence[Text], separator: str, width: int) -> Lines:
    """A label and its parts, wrapped between parts."""
    lines = [Text.assemble((f"{label:{LABEL_WIDTH}}", "dim"))]
    for part in parts:
        is_first = len(lines[-1]) == LABEL_WIDTH
        if not is_first and len(lines[-1]) + len(separator) + len(part) > width:
            lines.append(Text(" " * LABEL_WIDTH))
            is_first = True
        lines[-1].append("" if is_first else separator).append_text(part)
    return lines


def _phases(phases: Mapping[str, float], width: int) -> Lines:
    """Phases of the step time: a stacked bar and its legend."""
    total, bar_width = sum(phases.values()), width - LABEL_WIDTH
    if not total:
        return []
    bar = Text.assemble((f"{'phases':{LABEL_WIDTH}}", "dim"))
    legend, elapsed, drawn = [], 0.0, 0
    for (name, seconds), style in zip(phases.items(), cycle(PHASE_STYLES), strict=False):
        elapsed += seconds
        end = round(elapsed / total * bar_width)
        bar.append("█" * (end - drawn), style=style)
        drawn = end
        legend.append(Text.assemble(("■", style), f"{printable(name)} {seconds / total:.0%}"))
    return [bar, *_wrapped("", legend, " ", width)]


def _ranks(ranks: Sequence[RankView], now: float, count: int, width: int) -> Lines:
    """The `count` ranks with the longest steps, then the longest data wait; nothing for a single rank."""
    if len(ranks) < 2:
        return []
    slowest = sorted(ranks, key=lambda rank: (rank["step_seconds"] or 0, rank["wait_ratio"] or 0), reverse=True)
    lines = []
    for rank in slowest[:count]:
        parts = [f"data wait {format_percent(rank['wait_ratio'])}", f"queue {_count(rank['queue'])}"]
        parts += [f"step time {format_duration(rank['step_seconds'])}"] if rank["step_seconds"] is not None else []
        parts += [f"bad {_count(rank['bad_samples'])}", f"retries {_count(rank['retries'])}"]
        parts += [_ago(rank["time"], now)] if rank["time"] is not None else []
        parts += [rank["node"]] if rank["node"] else []
        lines += _row(f"rank {rank['rank']}", parts, width)
    if len(ranks) > count:
        lines += _row("", [f"and {len(ranks) - count:,} more"], width)
    return lines


def _messages(view: RunView, height: int | None) -> Lines:
    """The newest messages, as many as `height` lines hold; all without a limit."""
    newest = view["messages"] if height is None else view["messages"][max(0, len(view["messages"]) - height) :]
    lines = []
    for message in newest if height is None or height > 0 else []:
        moment = "" if message["time"] is None else time.strftime("%H:%M:%S", time.localtime(message["time"]))
        text = (printable(message["text"]), LEVEL_STYLES[message["level"]])
        lines.append(Text.assemble((f"{moment:{LABEL_WIDTH}}", "dim"), text))
    return lines


def _side_by_side(left: Lines, right: Lines, width: int) -> Lines:
    joined = []
    for left_line, right_line in zip_longest(left, right):
        line = Text() if left_line is None else left_line.copy()
        line.truncate(width, pad=True)
        joined.append(Text.assemble(line, " " * GAP, "" if right_line is None else right_line))
    return joined


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _ago(moment: float, now: float) -> str:
    return f"{format_duration(max(0.0, round(now - moment)))} ago"


def sparkline(values: Sequence[float | None], width: int, height: int = 1) -> list[str]:
    """Draw values as `height` lines of `width` characters, top line first; a missing value leaves its column empty.

    If there are more values than columns, each column shows a mean. The smallest value is drawn as the lowest block.
    """
    columns = _columns(values, width)
    known = [value for value in columns if value is not None]
    if not known:
        return [" " * width] * height
    low, high = min(known), max(known)
    top = EIGHTHS * height - 1
    fractions = (value if value is None else (value - low) / (high - low) if high > low else 0.5 for value in columns)
    heights = [0 if fraction is None else 1 + round(top * fraction) for fraction in fractions]
    rows = range(height - 1, -1, -1)
    return ["".join(LEVELS[max(0, min(EIGHTHS, eighths - EIGHTHS * row))] for eighths in heights) for row in rows]


def _columns(values: Sequence[float | None], width: int) -> list[float | None]:
    num_values = len(values)
    if num_values <= width:
        return [*values, *[None] * (width - num_values)]
    edges = [column * num_values // width for column in range(width + 1)]
    return [_mean(values[start:end]) for start, end in pairwise(edges)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""A run on a terminal: as much of its view as fits, most important first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from textwrap import wrap
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from launch.terminal.sparkline import sparkline
from launch.terminal.units import UNKNOWN, counted, duration, number, printable, ratio, size
from mcl_dist.run_log.listeners import MEASURES
from monitoring.history.curves import Columns
from monitoring.history.run_view import RankView, RunView

WIDE = 120  # columns from which there are two side by side
GAP = 3
TALL = 40  # lines from which curves are higher
LABEL_WIDTH, VALUE_WIDTH = 14, 10
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
FIGURES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("videos_per_second", "videos/s", number),
    ("seconds", "step", duration),
    ("data_wait_ratio", "waiting", ratio),
    ("gradient_norm", "gradient norm", number),
    ("learning_rate", "learning rate", number),
)
Lines = list[Text]


class Screen:
    """A view as a rich renderable; `fits` keeps it within the terminal's height, `trouble` says why it is old."""

    def __init__(self, view: RunView, trouble: str = "", *, fits: bool = False) -> None:
        self._view, self._trouble, self._fits = view, trouble, fits

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines of the terminal's width."""
        height = console.height if self._fits else None
        lines = screen_lines(self._view, options.max_width, height, self._trouble)
        for line in lines:
            line.truncate(options.max_width, overflow="ellipsis")
        yield from lines


def screen_lines(view: RunView, width: int, height: int | None, trouble: str = "") -> Lines:
    """The run in lines of `width` columns, at most `height` of them."""
    is_tall = height is not None and height >= TALL
    lines = [_title(view, width), _progress(view, width)]
    for text in filter(None, [trouble, *view["warnings"]]):
        lines += [
            Text(line, style="bold yellow") for line in wrap(f"! {printable(text)}", width, subsequent_indent="  ")
        ]
    if width >= WIDE:
        half = (width - GAP) // 2
        facts = _facts(view, half) + _ranks(view["ranks"], view["now"], 16 if is_tall else 8, half)
        lines += _beside(_figures(view, half, 3 if is_tall else 1), facts, half)
    else:
        lines += _figures(view, width, 2 if is_tall else 1) + _facts(view, width)
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
    words = f"step {step:,}" + (f" of {total:,}" if total else "")
    if view["epoch"] is not None:
        words += f"  epoch {view['epoch']}"
    if view["state"] not in ("finished", "failed", "stopped") and view["seconds_left"] is not None:
        words += f"  {duration(view['seconds_left'])} left"
    room = max(0, width - len(words) - 8)
    share = min(1.0, step / total) if total else 0.0
    done = round(share * room)
    return Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"), f" {share:4.0%}  ", words)


def _figures(view: RunView, width: int, height: int) -> Lines:
    values = view["whole"]["values"]
    terms = [name for name in values if name.startswith("loss")]
    curves = [(name, name.removeprefix("loss_").replace("loss", "total loss"), number) for name in terms]
    lines = []
    for name, label, shown in (*curves, *FIGURES):
        drawn = sparkline(values.get(name, []), max(4, width - LABEL_WIDTH - VALUE_WIDTH - 2), height)
        for row, curve in enumerate(drawn):
            is_last = row == height - 1
            text = f"{label:{LABEL_WIDTH}}" if is_last else " " * LABEL_WIDTH
            value = shown(view["latest"].get(name)) if is_last else ""
            lines.append(Text.assemble((text, "dim"), f"{value:>{VALUE_WIDTH}}  ", (curve, "cyan")))
    return lines


def _facts(view: RunView, width: int) -> Lines:
    counts = view["counts"]
    health = [f"skipped {counts['skipped']:,}", f"loss leaps {counts['spikes']:,}"]
    health.append(f"restarts {counted(view['restarts'])}" if view["restarts"] else f"starts {counts['starts']:,}")
    if view["goodput"] is not None:
        health.append(f"goodput {ratio(view['goodput'])}")
    facts = _phases(view["phases"], width)
    if view["loader"]:
        facts += _fact("data", _fed(view["loader"]), width)
    if view["evaluations"]["step"]:
        facts += _fact("kNN", _scored(view["evaluations"]), width)
    return facts + _fact("checkpoint", _saved(view), width) + _fact("steps", health, width)


def _saved(view: RunView) -> list[str]:
    newest, failed = view["checkpoint"], view["counts"]["checkpoints_failed"]
    words = ["none yet"]
    if newest is not None:
        known = (
            (newest["time"], _ago(newest["time"] or 0.0, view["now"])),
            (newest["seconds"], f"took {duration(newest['seconds'])}"),
            (newest["stall_seconds"], f"held up {duration(newest['stall_seconds'])}"),
            (newest["bytes"], size(newest["bytes"])),
        )
        words = [f"step {newest['step']:,}", *(text for value, text in known if value is not None)]
    return words + ([f"{failed:,} failed"] if failed else [])


def _scored(evaluations: Columns) -> list[str]:
    """What the encoder last came to on held-out videos."""
    newest = {name: column[-1] for name, column in evaluations["values"].items()}
    words = [f"{name} {ratio(newest.get(key))}" for key, name in MEASURES.items()]
    return [*words, f"step {evaluations['step'][-1]:,}", f"took {duration(newest.get('seconds'))}"]


def _fed(loader: Mapping[str, Any]) -> list[str]:
    reads = loader["cache_hits"] + loader["cache_misses"]
    words = [f"{loader['queue']:,} batches ready", f"bad {counted(loader['bad_samples'])}"]
    words.append(f"retries {counted(loader['retries'])}")
    return words + ([f"cache hits {ratio(loader['cache_hits'] / reads)}"] if reads else [])


def _fact(label: str, words: Sequence[str], width: int) -> Lines:
    return _wrapped(label, [Text(printable(word)) for word in words], " · ", width)


def _wrapped(label: str, parts: Sequence[Text], between: str, width: int) -> Lines:
    """Parts after their label, on as many lines as they need."""
    lines = [Text.assemble((f"{label:{LABEL_WIDTH}}", "dim"))]
    for part in parts:
        is_first = len(lines[-1]) == LABEL_WIDTH
        if not is_first and len(lines[-1]) + len(between) + len(part) > width:
            lines.append(Text(" " * LABEL_WIDTH))
            is_first = True
        lines[-1].append("" if is_first else between).append_text(part)
    return lines


def _phases(phases: Mapping[str, float], width: int) -> Lines:
    """Where a step's time goes: a bar, and what its parts are."""
    total, room = sum(phases.values()), width - LABEL_WIDTH
    if not total:
        return []
    bar = Text.assemble((f"{'step time':{LABEL_WIDTH}}", "dim"))
    words, passed, drawn = [], 0.0, 0
    for (name, seconds), style in zip(phases.items(), cycle(PHASE_STYLES), strict=False):
        passed += seconds
        end = round(passed / total * room)
        bar.append("█" * (end - drawn), style=style)
        drawn = end
        words.append(Text.assemble(("■", style), f"{printable(name)} {seconds / total:.0%}"))
    return [bar, *_wrapped("", words, " ", width)]


def _ranks(ranks: Sequence[RankView], now: float, most: int, width: int) -> Lines:
    """The ranks that wait longest for data or take longest for a step, as many as asked for."""
    if len(ranks) < 2:
        return []
    worst = sorted(ranks, key=lambda rank: (rank["step_seconds"] or 0, rank["wait_ratio"] or 0), reverse=True)
    lines = []
    for rank in worst[:most]:
        words = [f"waiting {ratio(rank['wait_ratio'])}", f"queue {_count(rank['queue'])}"]
        words += [f"step {duration(rank['step_seconds'])}"] if rank["step_seconds"] is not None else []
        words += [f"bad {_count(rank['bad_samples'])}", f"retries {_count(rank['retries'])}"]
        words += [_ago(rank["time"], now)] if rank["time"] is not None else []
        words += [rank["node"]] if rank["node"] else []
        lines += _fact(f"rank {rank['rank']}", words, width)
    if len(ranks) > most:
        lines += _fact("", [f"and {len(ranks) - most:,} more"], width)
    return lines


def _messages(view: RunView, room: int | None) -> Lines:
    newest = view["messages"] if room is None else view["messages"][max(0, len(view["messages"]) - room) :]
    lines = []
    for message in newest if room is None or room > 0 else []:
        moment = "" if message["time"] is None else time.strftime("%H:%M:%S", time.localtime(message["time"]))
        text = (printable(message["text"]), LEVEL_STYLES[message["level"]])
        lines.append(Text.assemble((f"{moment:{LABEL_WIDTH}}", "dim"), text))
    return lines


def _beside(left: Lines, right: Lines, width: int) -> Lines:
    rows = max(len(left), len(right))
    joined = []
    for index in range(rows):
        line = left[index].copy() if index < len(left) else Text()
        line.truncate(width, pad=True)
        joined.append(Text.assemble(line, " " * GAP, right[index] if index < len(right) else ""))
    return joined


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _ago(moment: float, now: float) -> str:
    return f"{duration(max(0.0, round(now - moment)))} ago"

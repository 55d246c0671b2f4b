from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from mcl_dist.events import (
    CheckpointWritten,
    Evaluated,
    Evaluating,
    Event,
    Failed,
    Finished,
    LoaderReport,
    LossSpike,
    Notice,
    Started,
    StepDone,
    StepSkipped,
)
from mcl_dist.run_log.listeners import EventLog, MetricsFile, event_record, step_record
from monitoring.history.curves import MOST_POINTS, NUM_RECENT, Curves
from monitoring.history.fold import NUM_MESSAGES, History
from monitoring.history.run_folder import RunFolder

DONE = StepDone(1, 0, 100, {"loss": 3.0}, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.25, gradient_norm=2.0)
REPORT = LoaderReport(20, 17, 2, {"checksum": 2}, 0.5, 2, {}, {"retries": {"stall": 3, "reset": 0}}, 0.0, 0)
EVENTS: tuple[Event, ...] = (
    Started(0, 100, None),
    DONE,
    replace(DONE, step=2, losses={"loss": math.nan}, gradient_norm=math.inf, taken=False),
    StepSkipped(2, ["a", "b", "c", "d"], "the loss is not finite", 1),
    LossSpike(2, 9.0, 3.0, None),
    REPORT,
    CheckpointWritten(2, "there", 1.5, 0.1, 412),
    Notice("a notice"),
)


def history_of(*events: Event) -> History:
    history = History("run", "here")
    for event in events:
        if isinstance(event, StepDone):
            history.add_step(step_record(event))
        else:
            history.add_event(event_record(event))
    return history


def written(folder: Path, *events: Event) -> Path:
    """A run folder with the files of these events."""
    listeners = (MetricsFile(folder / "metrics.jsonl"), EventLog(folder / "log.jsonl"))
    for event in events:
        for listener in listeners:
            listener(event)
    return folder


def test_memory_is_bounded_and_means_are_exact() -> None:
    curves = Curves()
    for step in range(1, 5001):
        curves.append(step, float(step), {"loss": step})
    whole, recent = curves.whole(), curves.recent()
    assert MOST_POINTS / 2 < len(whole["step"]) <= MOST_POINTS
    assert len(recent["step"]) == NUM_RECENT
    assert (whole["step"][-1], recent["step"][-1]) == (5000, 5000)
    width = whole["step"][0]
    assert whole["values"]["loss"][0] == (1 + width) / 2


def test_a_non_finite_value_is_a_gap_and_enters_no_mean() -> None:
    curves = Curves()
    for step in range(1, MOST_POINTS + 2):
        curves.append(step, None, {"loss": None if step == 1 else math.nan if step <= 4 else 2.0})
    assert curves.whole()["values"]["loss"][:3] == [None, None, 2.0]


def test_a_repeated_step_drops_the_later_ones() -> None:
    curves = Curves()
    for step in (1, 2, 3, 4, 3):
        curves.append(step, None, {"loss": float(step)})
    assert curves.whole()["step"] == curves.recent()["step"] == [1, 2, 3]


def test_the_view_of_a_run_folder_equals_that_of_its_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = []
    for make in (lambda: history_of(*EVENTS), lambda: RunFolder(written(tmp_path, *EVENTS))):
        seconds = count(1_800_000_000)
        monkeypatch.setattr(time, "time", lambda seconds=seconds: float(next(seconds)))
        views.append({**make().view(), "run": "", "source": ""})
    assert views[0] == views[1]


def test_a_view_is_plain_json_with_the_whole_state_of_the_run() -> None:
    view = json.loads(json.dumps(history_of(*EVENTS).view(), allow_nan=False))
    assert (view["state"], view["step"], view["total_steps"], view["seconds_left"]) == ("running", 2, 100, 49.0)
    assert view["latest"]["loss"] is None
    assert view["recent"]["values"]["loss"] == [3.0, None]
    assert view["counts"]["skipped"] == view["counts"]["skipped_in_a_row"] == view["counts"]["spikes"] == 1
    assert view["checkpoint"]["step"] == 2
    assert view["loader"]["bad_samples"] == {"checksum": 2}
    assert view["loader"]["retries"] == {"stall": 3}
    assert [message["level"] for message in view["messages"]] == ["info", "warning", "warning", "info"]
    assert view["messages"][1]["text"] == "step 2 skipped, the loss is not finite: a, b, c and 1 more"
    assert view["warnings"] == [
        "non-finite steps in a row: 1",
        "samples unaccounted for: 1",
        "25% of a step is spent waiting for data",
    ]


def test_a_finite_step_ends_a_row_of_skipped_steps() -> None:
    assert history_of(*EVENTS, replace(DONE, step=3)).view()["counts"]["skipped_in_a_row"] == 0


def test_phases_are_means_over_the_newest_steps() -> None:
    history = History("run", "here")
    for step, seconds in ((1, 1.0), (2, 3.0)):
        history.add_step({"time": 1.0, "step": step, "epoch": 0, "loss": 1.0, "phases": {"wait": seconds}})
    assert history.view()["phases"] == {"wait": 2.0}


@pytest.mark.parametrize(
    ("last", "idle_seconds", "alive", "state"),
    [
        (DONE, 1.0, True, "running"),
        (DONE, 1.0, False, "running"),
        (DONE, 30.0, False, "stopped"),
        (DONE, 30.0, None, "running"),
        (DONE, 90.0, True, "stalled"),
        (replace(DONE, seconds=20.0), 90.0, True, "running"),
        (Started(0, 100, None), 90.0, True, "starting"),
        (Evaluating(1, 3, 9), 90.0, True, "evaluating"),
        (Evaluating(1, 3, 9), 90.0, False, "stopped"),
        (Evaluated(1, {"top1": 0.5}, 9.0), 1.0, True, "running"),
        (Finished(100, 1), 90.0, False, "finished"),
        (Failed("the disk is full"), 90.0, False, "failed"),
    ],
)
def test_the_state_follows_from_the_last_event_its_age_and_the_process(
    monkeypatch: pytest.MonkeyPatch, last: Event, idle_seconds: float, alive: bool | None, state: str
) -> None:
    now = time.time()
    history = history_of(Started(0, 100, None), last)
    monkeypatch.setattr(time, "time", lambda: now + idle_seconds)
    assert history.view(alive=alive)["state"] == state


def test_evaluations_are_a_separate_curve_that_drops_steps_to_be_repeated() -> None:
    scores = [Evaluated(step, {"top1": step / 100, "top5": 1.0}, 2.5) for step in (20, 40)]
    history = history_of(Started(0, 100, None), *scores)
    assert history.view()["evaluations"]["values"] == {"top1": [0.2, 0.4], "top5": [1.0, 1.0], "seconds": [2.5, 2.5]}
    history.add_event(event_record(Started(30, 100, "there")))
    assert history.view()["evaluations"]["step"] == [20]


def test_messages_are_bounded() -> None:
    history = history_of(*[Notice(str(number)) for number in range(2 * NUM_MESSAGES)])
    assert [message["text"] for message in history.view()["messages"]][-1] == str(2 * NUM_MESSAGES - 1)
    assert len(history.view()["messages"]) == NUM_MESSAGES


def test_a_folder_is_read_incrementally(tmp_path: Path) -> None:
    folder = RunFolder(written(tmp_path, *EVENTS))
    assert folder.view()["step"] == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "step": 3, "epoch": 0, "loss": 1.0}\n{"time": 1, "step": 4, "ep')  # incomplete line
    assert folder.view()["step"] == 3


def test_a_run_that_resumed_from_an_earlier_step_is_read_again(tmp_path: Path) -> None:
    steps = [replace(DONE, step=step) for step in range(1, 9)]
    folder = RunFolder(written(tmp_path, Started(0, 100, None), *steps))
    assert folder.view()["step"] == 8
    written(tmp_path, Started(5, 100, "there"), *[replace(step, losses={"loss": 1.0}) for step in steps[5:]])
    view = folder.view()
    assert view["recent"]["step"] == list(range(1, 9))
    assert view["recent"]["values"]["loss"] == [3.0] * 5 + [1.0] * 3
    assert view["counts"]["starts"] == 2


def test_unreadable_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    written(tmp_path, *EVENTS)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": 1, "ev{"time": 2}\n[1]\n{"time": 3, "event": "Started"}\n')
    assert "3 lines of metrics.jsonl and log.jsonl cannot be read, left out" in RunFolder(tmp_path).view()["warnings"]


def test_other_ranks_are_read_from_their_logs(tmp_path: Path) -> None:
    written(tmp_path, *EVENTS)
    other = EventLog(tmp_path / "log-00001.jsonl")
    other(Started(0, 100, None))
    other(replace(REPORT, waited_seconds=7.0, queue=0))
    folder = RunFolder(tmp_path)
    assert [(rank["rank"], rank["queue"]) for rank in folder.view()["ranks"]] == [(0, 2), (1, 0)]
    other(replace(REPORT, queue=5))
    view = folder.view()
    assert [(rank["rank"], rank["queue"]) for rank in view["ranks"]] == [(0, 2), (1, 5)]
    assert view["loader"]
    assert view["loader"]["expected"] == 40

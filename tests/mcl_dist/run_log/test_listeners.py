from __future__ import annotations

import errno
import io
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcl_dist.errors import RankError
from mcl_dist.events import CheckpointWritten, Evaluated, Finished, LossSpike, Restarted, Started, StepDone, StepSkipped
from mcl_dist.run_log.listeners import Console, EventLog, MetricsFile


def done(step: int) -> StepDone:
    losses = {"loss": 3.0, "loss_inter": 2.0, "similarity_positive": 0.5}
    done = StepDone(step, 0, 4, losses, 1e-3, videos=8, seconds=0.5, data_wait_ratio=0.25, gradient_norm=0.25)
    return replace(done, phases={"wait": 0.125}, momentum=0.99, queue_fill=0.5, queue_age=3.0, flops=1e9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_shows_losses_speed_waiting_and_remaining_time() -> None:
    stream = io.StringIO()
    Console(stream)(done(2))
    assert stream.getvalue() == (
        "step 2/4  epoch 0  loss 3.000  inter 2.000  lr 1.00e-03  16.0 videos/s  waiting 25%  left 0:00:01\n"
    )


def test_without_a_terminal_progress_lines_are_rare_and_the_last_step_has_one() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for step in (1, 2, 3, 4):
        console(done(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/4", "4/4"]


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    console = Console(stream)
    for step in (1, 2, 3, 4):
        console(done(step))
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r\033[K") == 4


def test_a_resumed_run_shows_its_checkpoint() -> None:
    stream = io.StringIO()
    Console(stream)(Started(20, 60, "runs/x/checkpoints/step-000000020"))
    assert stream.getvalue() == "resumed from runs/x/checkpoints/step-000000020, 20 of 60 steps done\n"


def test_a_restart_shows_its_reason_and_the_lost_time() -> None:
    stream = io.StringIO()
    Console(stream)(Restarted("outage", 0, 27.0, "an unexpected exit", 20))
    assert stream.getvalue() == "resumed after an unexpected exit; 0:00:27 lost\n"


def test_metrics_have_one_line_per_step_and_drop_steps_that_will_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics(Started(0, 4, None))
    for step in (1, 2, 3):
        metrics(done(step))
    path.write_text(path.read_text() + '{"step": 4, "los')  # cut off by a kill
    metrics(Started(2, 4, "there"))
    metrics(done(3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {
        "time": 1.8e9,
        "step": 1,
        "epoch": 0,
        "loss": 3.0,
        "loss_inter": 2.0,
        "similarity_positive": 0.5,
        "learning_rate": 1e-3,
        "gradient_norm": 0.25,
        "taken": True,
        "videos_per_second": 16.0,
        "data_wait_ratio": 0.25,
        "seconds": 0.5,
        "phases": {"wait": 0.125},
        "momentum": 0.99,
        "queue_fill": 0.5,
        "queue_age": 3.0,
        "flops_per_second": 2e9,
    }


def test_non_finite_values_are_null_in_the_metrics_and_shown_with_their_samples(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    skipped = replace(done(3), losses={"loss": math.nan}, gradient_norm=math.inf, taken=False)
    MetricsFile(path)(skipped)
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is line["gradient_norm"] is None
    assert line["taken"] is False
    Console(stream)(StepSkipped(3, [f"video {number}" for number in range(6)], "the loss is not finite", 2))
    assert stream.getvalue() == (
        "step 3 skipped, 2 in a row: video 0, video 1, video 2, video 3 and 2 more: the loss is not finite\n"
    )


def test_a_loss_spike_is_shown_with_its_rollback() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console(LossSpike(30, 9.5, 3.25, None))
    console(LossSpike(40, 9.5, 3.25, 20))
    spike = "loss spike: 9.500 (limit 3.250)"
    assert stream.getvalue() == f"step 30: {spike}\nstep 40: {spike}; rolled back to the checkpoint of step 20\n"


def test_an_evaluation_is_shown_with_its_duration() -> None:
    stream = io.StringIO()
    Console(stream)(Evaluated(40, {"top1": 0.5, "top5": 0.875, "mean_class": 0.25}, 12.34))
    assert stream.getvalue() == (
        "step 40: kNN of held-out videos  top-1 50.0%  top-5 87.5%  mean of classes 25.0%  in 12.3 s\n"
    )


def test_the_event_log_has_all_events_except_steps(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    for event in (Started(0, 1, None), done(1), CheckpointWritten(1, "there", 0.1, 0.0, 9), Finished(1, 2**30)):
        log(event)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["Started", "CheckpointWritten", "Finished"]


def test_an_incomplete_last_line_of_the_event_log_is_removed_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    EventLog(path)(Started(0, 4, None))
    complete = path.read_text()
    path.write_text(complete + '{"time": 1.0, "event": "Checkp')  # cut off by a full disk
    EventLog(path)(Finished(4, 0))
    assert path.read_text().startswith(complete)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["Started", "Finished"]


@pytest.mark.parametrize("listener", [EventLog, MetricsFile])
def test_a_full_disk_is_an_error_of_this_rank_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: type[EventLog | MetricsFile]
) -> None:
    log = listener(tmp_path / "lines.jsonl")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RankError, match=r"lines\.jsonl: no space left"):
        log(Finished(4, 0) if listener is EventLog else done(1))


def test_a_restart_on_a_full_disk_keeps_the_existing_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics(done(1))
    kept = path.read_text()

    def full(file: Path, *_: Any) -> Any:
        file.touch()
        os.truncate(file, 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    for writing in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, writing, full)
    with pytest.raises(RankError, match=r"metrics\.jsonl: no space left"):
        metrics(Started(1, 4, None))
    assert path.read_text() == kept

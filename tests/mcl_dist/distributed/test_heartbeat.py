from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mcl_dist.distributed.heartbeat import STEPPING, Heartbeat, read_beats


def stale(*_: object) -> int:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_callback_that_fails_once_on_a_network_disk_does_not_end_the_heartbeat(tmp_path: Path) -> None:
    outcomes = iter([stale, lambda: None])
    calls: list[str] = []
    heartbeat = Heartbeat(tmp_path, rank=3)
    heartbeat.on_beat(lambda: next(outcomes)())
    heartbeat.on_beat(lambda: calls.append("another callback"))
    for _ in range(2):
        heartbeat.beat()
    assert len(calls) == 2
    assert [beat.rank for beat in read_beats(tmp_path)] == [3]


def test_the_next_beat_is_written_after_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", stale)
        heartbeat.beat()
    assert read_beats(tmp_path) == []
    heartbeat.enter_phase(STEPPING)
    heartbeat.beat()
    assert [beat.phase for beat in read_beats(tmp_path)] == [STEPPING]

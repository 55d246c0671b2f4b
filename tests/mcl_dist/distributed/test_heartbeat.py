from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mcl_dist.distributed.heartbeat import STEPPING, Heartbeat, read_beats


def stale(*_: object) -> int:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_look_that_a_network_disk_fails_once_does_not_end_the_beats(tmp_path: Path) -> None:
    looks = iter([stale, lambda: None])
    seen: list[str] = []
    heartbeat = Heartbeat(tmp_path, rank=3)
    heartbeat.at_every_beat(lambda: next(looks)())
    heartbeat.at_every_beat(lambda: seen.append("another look"))
    for _ in range(2):
        heartbeat._beat()
    assert len(seen) == 2
    assert [beat.rank for beat in read_beats(tmp_path)] == [3]


def test_a_beat_that_cannot_be_written_is_made_up_for_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", stale)
        heartbeat._beat()
    assert read_beats(tmp_path) == []
    heartbeat.enters(STEPPING)
    heartbeat._beat()
    assert [beat.phase for beat in read_beats(tmp_path)] == [STEPPING]

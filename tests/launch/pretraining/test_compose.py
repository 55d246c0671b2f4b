from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from launch.pretraining.compose import IMMUTABLE_KEYS
from launch.run.config import PretrainConfig
from launch.run.parts import open_listeners, resume
from mcl_dist.config import load_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.errors import UserError
from mcl_dist.run_log.goodput import StartInfo
from mcl_dist.run_log.listeners import Console


def stored_config(*changes: str) -> dict[str, Any]:
    """A configuration as checkpoints store it."""
    config = load_config(PretrainConfig, None, ["data.train=set", "run.dir=run", *changes])
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("data.shuffle_window=8", "data.shuffle_window=256, now 8"),
        ("data.min_windows=2", "data.min_windows=1, now 2"),
        ("optimizer.name=adamw", "optimizer.name=sgd, now adamw"),
    ],
)
def test_a_run_with_another_sample_order_or_optimizer_does_not_resume(change: str, found: str) -> None:
    snapshot = SimpleNamespace(step=4, config=stored_config())
    checkpoints: Any = SimpleNamespace(
        latest=lambda _: (4, []), load=lambda _: snapshot, step_url=lambda _: "run/checkpoints/step-000000004"
    )
    state: Any = SimpleNamespace(restore=lambda *_: None)
    with pytest.raises(UserError, match=f"step-000000004: made with {found}; set it back"):
        resume(state, checkpoints, stored_config(change), [], immutable_keys=IMMUTABLE_KEYS)
    assert resume(state, checkpoints, stored_config(), [], immutable_keys=IMMUTABLE_KEYS) is snapshot


def test_an_error_is_raised_unchanged_if_the_log_cannot_be_written(tmp_path: Path) -> None:
    def run() -> NoReturn:
        with open_listeners(tmp_path, ProcessGroup(), StartInfo(0.0), Console(), nullcontext()):
            (tmp_path / "log.jsonl").mkdir()
            raise UserError("the store has failed")

    with pytest.raises(UserError, match="the store has failed"):
        run()

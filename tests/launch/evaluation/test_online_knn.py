from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.evaluation.online_knn import OnlineKnn
from launch.run.config import PretrainConfig
from mcl_dist.config import build_config
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.events import Evaluating, Event, Notice
from mcl_dist.model.encoder import Encoder, EncoderConfig

ENCODER = EncoderConfig(width=4, blocks=(1, 1))


def config(train: Path, test: Path) -> PretrainConfig:
    tree = {
        "run": {"dir": "none"},
        "data": {"train": str(train), "frames": 8, "stride": 4, "crop": 32},
        "evaluate": {"every": 1, "test": str(test), "clips": 1, "videos": 6},
    }
    return build_config(PretrainConfig, tree)


def test_a_set_that_cannot_be_used_is_told_before_the_run_begins(synthetic_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/manifest\.json: missing"):
        OnlineKnn(config(synthetic_shards, tmp_path / "nothing"), ProcessGroup(), print)


def test_a_damaged_video_costs_the_evaluation_and_not_the_run(synthetic_shards: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    shutil.copytree(synthetic_shards, test)
    shard = test / "shard-000000.tar"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    told: list[Event] = []
    held_out = OnlineKnn(config(synthetic_shards, test), ProcessGroup(), told.append)
    assert held_out(Encoder(ENCODER), 7) is None
    held_out.close()
    assert told[:2] == [Evaluating(7, 0, 6), Evaluating(7, 0, 6)]
    (notice,) = told[2:]
    assert isinstance(notice, Notice)
    assert notice.text.startswith("step 7: not evaluated: ")
    assert "is not what was stored" in notice.text


def test_a_rank_that_is_asked_to_stop_leaves_off_evaluating(synthetic_shards: Path) -> None:
    told: list[Event] = []
    stop = StopRequest()
    stop.ask("SIGTERM")
    held_out = OnlineKnn(config(synthetic_shards, synthetic_shards), ProcessGroup(), told.append, stop)
    assert held_out(Encoder(ENCODER), 7) is None
    held_out.close()
    assert told == [Evaluating(7, 0, 6), Notice("step 7: not evaluated: asked to stop (SIGTERM) at rank 0")]

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dataloading.loader.config import DataConfig
from launch.evaluation.online_knn import OnlineKnn
from launch.run.config import EvaluateConfig
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.distributed.shutdown import StopRequest
from mcl_dist.errors import UserError
from mcl_dist.events import Evaluating, Event, Listener, Notice
from mcl_dist.model.encoder import Encoder, EncoderConfig

ENCODER = EncoderConfig(width=4, blocks=(1, 1))


def knn_of(train: Path, test: Path, listen: Listener, stop: StopRequest | None = None) -> OnlineKnn:
    config = EvaluateConfig(every=1, test=str(test), clips=1, videos=6)
    data = DataConfig(train=str(train), frames=8, stride=4, crop=32)
    return OnlineKnn(config, data, Path("none"), ProcessGroup(), listen, stop)


def test_an_unusable_set_is_reported_before_the_run_starts(synthetic_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing/manifest\.json: missing"):
        knn_of(synthetic_shards, tmp_path / "nothing", print)


def test_a_damaged_video_skips_the_evaluation_and_does_not_stop_the_run(synthetic_shards: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    shutil.copytree(synthetic_shards, test)
    shard = test / "shard-000000.tar"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    events: list[Event] = []
    online_knn = knn_of(synthetic_shards, test, events.append)
    assert online_knn(Encoder(ENCODER), 7) is None
    online_knn.close()
    assert events[:2] == [Evaluating(7, 0, 6), Evaluating(7, 0, 6)]
    (notice,) = events[2:]
    assert isinstance(notice, Notice)
    assert notice.text.startswith("step 7: not evaluated: ")
    assert "does not match its checksum" in notice.text


def test_a_stop_request_ends_the_evaluation(synthetic_shards: Path) -> None:
    events: list[Event] = []
    stop = StopRequest()
    stop.request("SIGTERM")
    online_knn = knn_of(synthetic_shards, synthetic_shards, events.append, stop)
    assert online_knn(Encoder(ENCODER), 7) is None
    online_knn.close()
    assert events == [Evaluating(7, 0, 6), Notice("step 7: not evaluated: asked to stop (SIGTERM) at rank 0")]

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataloading.reading.fetcher import FetchConfig
from dataloading.reading.shard_set import ShardSet
from dataloading.sampling.epoch_order import sample_generator
from dataloading.sampling.tubelets import CutConfig, draw_tubelets
from launch.cli.main import main
from mcl_dist.batch import QUERY
from tests.support.nginx import running_nginx

MAX_READ_RATIO = 1.15  # bytes read per byte of the stills that are decoded
CUT = CutConfig(frames=16, stride=2, motion_probability=0.7, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3))


def read_drawn(shards: ShardSet, epoch: int) -> None:
    """Read of each video what a step reads: maps and scores, the stills of four views, the flow of one."""
    for position in range(len(shards)):
        video = shards.read(position)
        _, tubelets = draw_tubelets(
            sample_generator(0, epoch, position),
            CUT,
            frame_maps=video.frame_maps,
            clip_scores=video.clip_scores,
            height=video.height,
            width=video.width,
        )
        video.frames(np.unique(np.concatenate([tubelet.frames for tubelet in tubelets])))
        video.flow(tubelets[QUERY].frames)


@pytest.mark.slow
def test_ranges_of_real_clips_read_little_more_than_is_decoded(real_videos: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "arm_wrestling").symlink_to(real_videos / "arm_wrestling")
    assert main(["shards", "build", str(tmp_path / "videos"), str(tmp_path / "set"), "--flow", "dis"]) == 0
    with running_nginx(tmp_path / "nginx", tmp_path) as url:
        shards = ShardSet(f"{url}/set", str(tmp_path / "cache"), FetchConfig(fetch="ranges"))
        for epoch in range(8):
            read_drawn(shards, epoch)
        shards.close()
    counters = shards.counters()
    assert counters["bytes_decoded"] > 1_000_000
    assert counters["bytes_decoded"] < counters["bytes_read"] <= MAX_READ_RATIO * counters["bytes_decoded"]

from __future__ import annotations

from pathlib import Path

import torch

from mcl_dist.checkpoint import COMMITTED, CheckpointManager, CheckpointShard
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointWritten


def test_what_is_told_of_checkpoints_names_no_credentials(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(f"memory://user:s3cret@{tmp_path.name}", ProcessGroup())
    for step in (1, 2):
        checkpoints.save(CheckpointShard(step, {"weight": torch.full((2,), float(step))}))
    checkpoints._folder.write(f"step-000000002/{COMMITTED}", b"{}")
    newest, refused = checkpoints.latest()
    assert newest == 1
    assert checkpoints.load(1).network["weight"].tolist() == [1.0, 1.0]
    written = [event.url for event in checkpoints.news() if isinstance(event, CheckpointWritten)]
    told = [*written, *(event.url for event in refused)]
    assert told == [f"memory://{tmp_path.name}/step-00000000{step}" for step in (1, 2, 2)]

from __future__ import annotations

from pathlib import Path

import torch

from mcl_dist.checkpoint import COMMITTED, CheckpointManager, CheckpointShard
from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.events import CheckpointWritten
from mcl_dist.storage.folder import Folder


def test_events_of_checkpoints_contain_no_credentials(tmp_path: Path) -> None:
    url = f"memory://user:s3cret@{tmp_path.name}"
    checkpoints = CheckpointManager(url, ProcessGroup())
    for step in (1, 2):
        checkpoints.save(CheckpointShard(step, {"weight": torch.full((2,), float(step))}))
    Folder(url).write(f"step-000000002/{COMMITTED}", b"{}")
    newest, rejected = checkpoints.latest()
    assert newest == 1
    assert checkpoints.load(1).network["weight"].tolist() == [1.0, 1.0]
    written = [event.url for event in checkpoints.pop_events() if isinstance(event, CheckpointWritten)]
    reported = [*written, *(event.url for event in rejected)]
    assert reported == [f"memory://{tmp_path.name}/step-00000000{step}" for step in (1, 2, 2)]
